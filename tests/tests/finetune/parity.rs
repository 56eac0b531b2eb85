//! 50 steps against PEFT, transformers and torch (`reference/make_finetune_fixtures.py`): the losses, the gradients of
//! the first step and what is trained in the end.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use cadre_engine::{
    compute::Compute,
    nn::{Decoder, Format},
    train::{
        Batch, Dropout, RouterLossOptions, RoutingNoise, StepLosses, Trainer,
        optimizer::{AdamW, AdamWOptions},
        parameters::{Gradients, Parameters},
        trained::Trained,
    },
};
use cadre_models::{
    FormatOptions, Placement,
    adapter::{AdapterFiles, AdapterLayout, Lora, LoraOptions, LoraPlan},
    load, open,
};
use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};

/// Relative, of the losses at the first and the last step; between them in proportion.
const FIRST: f64 = 1e-5;
const LAST: f64 = 1e-4;

/// Tokens, and which of them are targets.
type Sequence = (Vec<u32>, Vec<bool>);

struct Case {
    name: String,
    folder: PathBuf,
    about: Value,
    expected: HashMap<String, Tensor>,
}

fn fixtures() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fixtures")
}

impl Case {
    fn read(name: &str) -> Result<Self> {
        let folder = fixtures().join("finetune").join(name);
        let about = serde_json::from_slice(&fs::read(folder.join("case.json"))?)?;
        let expected = candle_core::safetensors::load(folder.join("expected.safetensors"), &Device::Cpu)?;
        Ok(Self { name: name.to_owned(), folder, about, expected })
    }

    fn number(&self, field: &str) -> Result<f64> {
        self.about[field].as_f64().with_context(|| format!("{field} of {}", self.name))
    }

    fn curve(&self, name: &str) -> Result<Option<Vec<f64>>> {
        let curve: Option<&Tensor> = self.expected.get(name);
        Ok(curve.map(|curve| curve.to_dtype(DType::F64)?.to_vec1()).transpose()?)
    }

    fn decoder(&self, compute: &Compute) -> Result<Decoder> {
        let folder = fixtures().join(self.about["model"].as_str().context("model")?);
        let checkpoint = open(folder.to_str(), &|_| {})?;
        Ok(load(&checkpoint, &FormatOptions::all(Format::F32), Placement::Resident, compute, &|_| {})?.decoder)
    }

    /// The sequences of each step: tokens, and which of them are targets.
    fn steps(&self) -> Result<Vec<Vec<Sequence>>> {
        let numbers = |name: &str| -> Result<Vec<Vec<Vec<u32>>>> {
            let tensor: &Tensor = self.expected.get(name).context("batches")?;
            Ok(tensor.to_dtype(DType::U32)?.to_vec3()?)
        };
        let (ids, mask) = (numbers("input_ids")?, numbers("loss_mask")?);
        let pair = |(ids, mask): (Vec<u32>, Vec<u32>)| (ids, mask.iter().map(|is| *is > 0).collect());
        Ok(ids.into_iter().zip(mask).map(|(ids, mask)| ids.into_iter().zip(mask).map(pair).collect()).collect())
    }
}

/// What is trained, its numbers, and how adapters are saved.
struct Trainee {
    trained: Trained,
    parameters: Parameters,
    files: Option<AdapterFiles>,
}

impl Trainee {
    fn new(case: &Case, decoder: &Decoder) -> Result<Self> {
        if case.about["mode"] == "full" {
            let mut parameters = Parameters::default();
            let trained = Trained::weights(decoder, &mut parameters, |_| true)?;
            return Ok(Self { trained, parameters, files: None });
        }
        let config = json!({
            "peft_type": "LORA",
            "r": case.about["rank"],
            "lora_alpha": case.about["alpha"],
            "target_modules": case.about["target_modules"],
            "target_parameters": case.about["target_parameters"],
        });
        let folder = tempfile::tempdir()?;
        fs::write(folder.path().join("adapter_config.json"), config.to_string())?;
        fs::copy(case.folder.join("init.safetensors"), folder.path().join("adapter_model.safetensors"))?;
        let Lora { trained, parameters, files } = Lora::read(folder.path(), decoder)?;
        Ok(Self { trained, parameters, files: Some(files) })
    }
}

/// What is trained, by its name in a file.
fn named(files: Option<&AdapterFiles>, parameters: &Parameters) -> Result<HashMap<String, Vec<f32>>> {
    let Some(files) = files else {
        return Ok(parameters.iter().map(|one| (one.name.clone(), one.values.clone())).collect());
    };
    let folder = tempfile::tempdir()?;
    files.write(folder.path(), parameters)?;
    read_all(&folder.path().join("adapter_model.safetensors"))
}

fn read_all(file: &Path) -> Result<HashMap<String, Vec<f32>>> {
    let tensors = candle_core::safetensors::load(file, &Device::Cpu)?;
    let values = |(name, tensor): (String, Tensor)| Ok((name, tensor.flatten_all()?.to_vec1()?));
    tensors.into_iter().map(values).collect()
}

/// The gradients in place of the parameters.
fn as_parameters(parameters: &Parameters, gradients: &Gradients) -> Parameters {
    let mut copy = parameters.clone();
    copy.iter_mut().zip(gradients.iter()).for_each(|(one, gradient)| one.values.copy_from_slice(gradient));
    copy
}

/// Compares all tensors of the case called `prefix` and some name: the norm of the difference, as a part of their own.
fn compare(case: &Case, prefix: &str, found: &HashMap<String, Vec<f32>>, tolerance: f64) -> Result<()> {
    let mut compared = 0;
    for (name, expected) in case.expected.iter().filter_map(|(name, tensor)| Some((name.strip_prefix(prefix)?, tensor)))
    {
        let expected: Vec<f32> = expected.flatten_all()?.to_vec1()?;
        let found = found.get(name).with_context(|| format!("{}: no {name}", case.name))?;
        ensure!(expected.len() == found.len(), "{}: {prefix}{name} has another size", case.name);
        let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        let difference = norm(&mut expected.iter().zip(found).map(|(a, b)| a - b));
        let expected = norm(&mut expected.iter().copied());
        ensure!(
            difference <= tolerance * expected,
            "{}: {prefix}{name} is off by {difference} of {expected}",
            case.name
        );
        compared += 1;
    }
    ensure!(compared > 0, "{}: nothing called {prefix}", case.name);
    Ok(())
}

/// A step's sequences in one batch, or each in its own.
fn batches(step: &[Sequence], apart: bool) -> Result<Vec<Batch>> {
    let mut batches = vec![Batch::default()];
    for (index, (tokens, targets)) in step.iter().enumerate() {
        if apart && index > 0 {
            batches.push(Batch::default());
        }
        batches.last_mut().context("a batch")?.push(tokens, targets)?;
    }
    Ok(batches)
}

fn check(name: &str) -> Result<()> {
    let case = Case::read(name)?;
    let compute = Compute::new(2);
    let decoder = case.decoder(&compute)?;
    let Trainee { trained, parameters, files } = Trainee::new(&case, &decoder)?;
    let router = RouterLossOptions {
        balance: case.number("router_aux_loss_coef")? as f32,
        z: case.number("router_z_loss_coef")? as f32,
    };
    let mut trainer = Trainer::new(compute.clone(), decoder, trained, parameters, router)?;
    let options = AdamWOptions { weight_decay: case.number("weight_decay")?, ..AdamWOptions::default() };
    let mut optimizer = AdamW::new(options, &trainer.parameters);
    let curve = case.curve("loss")?.context("loss")?;
    let (balance, z) = (case.curve("aux_loss")?, case.curve("z_loss")?);
    let norms = case.curve("grad_norm")?.context("grad_norm")?;
    let close = |what: &str, step: usize, found: f64, expected: f64, slack: f64| {
        let tolerance = (FIRST + (LAST - FIRST) * step as f64 / (curve.len() - 1) as f64) * slack;
        let difference = (found / expected - 1.0).abs();
        ensure!(difference <= tolerance, "{name}: {what} of step {step} is {found}, expected {expected}");
        Ok(())
    };
    for (step, sequences) in case.steps()?.iter().enumerate() {
        let together = batches(sequences, false)?;
        let (losses, mut gradients) = trainer.gradients(&together)?;
        close("loss", step, losses.cross_entropy, curve[step], 1.0)?;
        if let (Some(balance), Some(z)) = (&balance, &z) {
            close("load-balancing loss", step, losses.balance, balance[step], 1.0)?;
            close("z-loss", step, losses.z, z[step], 1.0)?;
        }
        // A norm adds the rounding of all gradients.
        close("gradient norm", step, gradients.norm(), norms[step], 10.0)?;
        if step == 0 {
            let values = as_parameters(&trainer.parameters, &gradients);
            compare(&case, "grad.", &named(files.as_ref(), &values)?, 1e-5)?;
            same_however(&mut trainer, &together, &losses, &gradients)?;
            accumulated(&trainer, &batches(sequences, true)?, &losses, &gradients)?;
        }
        gradients.clip(case.number("max_grad_norm")?);
        optimizer.update(&compute.pool, &mut trainer.parameters, &gradients, case.number("learning_rate")?)?;
        trainer.write_back()?;
    }
    // Without weight decay they would be off by 1e-4.
    compare(&case, "final.", &named(files.as_ref(), &trainer.parameters)?, 5e-5)
}

/// Keeping more changes no bit, nor do losses need gradients.
fn same_however(trainer: &mut Trainer, batches: &[Batch], losses: &StepLosses, gradients: &Gradients) -> Result<()> {
    kept_otherwise(trainer, batches, losses, gradients)?;
    ensure!(trainer.losses(batches)? == *losses, "other losses without gradients");
    Ok(())
}

/// Keeping more changes no bit.
fn kept_otherwise(trainer: &mut Trainer, batches: &[Batch], losses: &StepLosses, gradients: &Gradients) -> Result<()> {
    for layer in [1, usize::MAX, 0] {
        trainer.keep_from(layer);
        let (again, others) = trainer.gradients(batches)?;
        ensure!((&again, &others) == (losses, gradients), "other gradients with layers kept from {layer} on");
    }
    Ok(())
}

/// Several batches are one, but for the order of sums.
fn accumulated(trainer: &Trainer, batches: &[Batch], losses: &StepLosses, gradients: &Gradients) -> Result<()> {
    ensure!(batches.len() > 1, "several batches");
    let (again, others) = trainer.gradients(batches)?;
    ensure!((again.cross_entropy - losses.cross_entropy).abs() < 1e-9 * losses.cross_entropy + 1e-9, "{again:?}");
    ensure!((again.balance - losses.balance).abs() < 1e-6 && (again.z - losses.z).abs() < 1e-6, "{again:?}");
    for (one, other) in gradients.iter().zip(others.iter()) {
        let largest = one.iter().fold(1e-9_f32, |max, x| max.max(x.abs()));
        let difference = one.iter().zip(other).fold(0.0_f32, |max, (a, b)| max.max((a - b).abs()));
        ensure!(difference <= 1e-5 * largest, "accumulated gradients are off by {difference} of {largest}");
    }
    Ok(())
}

/// The loss rises along the gradients as they say.
fn slope_is_right(trainer: &mut Trainer, batches: &[Batch], gradients: &Gradients) -> Result<()> {
    let before = trainer.parameters.clone();
    let square = gradients.norm().powi(2);
    let by = 1e-3 / square;
    let mut moved = |by: f64| -> Result<f64> {
        trainer.parameters.clone_from(&before);
        for (parameter, gradient) in trainer.parameters.iter_mut().zip(gradients.iter()) {
            parameter.values.iter_mut().zip(gradient).for_each(|(value, slope)| *value += by as f32 * slope);
        }
        Ok(trainer.gradients(batches)?.0.cross_entropy)
    };
    let slope = (moved(by)? - moved(-by)?) / (2.0 * by) / square;
    trainer.parameters = before;
    ensure!((slope - 1.0).abs() < 0.01, "the loss rises by {slope} of what its gradients say");
    Ok(())
}

/// Dropout drops the same values however a step is computed, and its gradients are those of the loss with these dropped.
#[test]
fn dropout_follows_the_token() -> Result<()> {
    for name in ["bailing_moe_v2-experts", "qwen3_moe-attention"] {
        let case = Case::read(name)?;
        let decoder = case.decoder(&Compute::new(2))?;
        let Trainee { trained, parameters, .. } = Trainee::new(&case, &decoder)?;
        let mut trainer = Trainer::new(Compute::new(2), decoder, trained, parameters, RouterLossOptions::default())?;
        let steps = case.steps()?;
        let sequences = &steps[0];
        let together = batches(sequences, false)?;
        let (whole, _) = trainer.gradients(&together)?;
        let dropout = Dropout { rate: 0.3, seed: 1, step: 7 };
        trainer.dropout = Some(dropout);
        let (losses, gradients) = trainer.gradients(&together)?;
        ensure!(
            losses != whole && trainer.losses(&together)? == whole,
            "{name}: dropped where nothing should be, or not"
        );
        kept_otherwise(&mut trainer, &together, &losses, &gradients)?;
        accumulated(&trainer, &batches(sequences, true)?, &losses, &gradients)?;
        slope_is_right(&mut trainer, &together, &gradients)?;
        trainer.dropout = Some(Dropout { step: 8, ..dropout });
        ensure!(trainer.gradients(&together)?.0 != losses, "{name}: another step drops the same");
    }
    Ok(())
}

/// New adapters add nothing yet: so the mean of their gradients over many masks is what they are without dropout.
#[test]
fn dropout_changes_no_expectation() -> Result<()> {
    let case = Case::read("qwen3_moe-attention")?;
    let decoder = case.decoder(&Compute::new(2))?;
    let options = LoraOptions {
        rank: 2,
        alpha: 2.0,
        rslora: false,
        dropout: 0.5,
        targets: vec!["self_attn".to_owned()],
        layout: AdapterLayout::Fused,
        seed: 1,
    };
    let Lora { trained, parameters, .. } = LoraPlan::new(&decoder, "tiny", &options)?.build()?;
    let mut trainer = Trainer::new(Compute::new(2), decoder, trained, parameters, RouterLossOptions::default())?;
    let batch = batches(&case.steps()?[0], false)?;
    let (_, expected) = trainer.gradients(&batch)?;
    const MASKS: u64 = 400;
    let mut mean: Vec<Vec<f32>> = expected.iter().map(|one| vec![0.0; one.len()]).collect();
    let mut spread = 0.0;
    for step in 0..MASKS {
        trainer.dropout = Some(Dropout { rate: 0.5, seed: 1, step });
        let (_, found) = trainer.gradients(&batch)?;
        for ((sums, found), expected) in mean.iter_mut().zip(found.iter()).zip(expected.iter()) {
            for ((sum, x), e) in sums.iter_mut().zip(found).zip(expected) {
                *sum += x / MASKS as f32;
                spread += f64::from(x - e).powi(2) / MASKS as f64;
            }
        }
    }
    let pairs = mean.iter().flatten().zip(expected.iter().flatten());
    let off = pairs.map(|(mean, expected)| f64::from(mean - expected).powi(2)).sum::<f64>();
    // The mean of so many has as many times less variance.
    ensure!(spread > 0.0 && off < 2.0 * spread / MASKS as f64, "{off} is not {spread} / {MASKS}");
    Ok(())
}

/// Noise in the choice of experts is the same however a step is computed, and gradients are those of the loss with it.
#[test]
fn routing_noise_follows_the_token() -> Result<()> {
    for name in ["bailing_moe_v2-router-aux", "qwen3_moe-router-aux"] {
        let case = Case::read(name)?;
        let trainer = |threads: usize| -> Result<Trainer> {
            let compute = Compute::new(threads);
            let decoder = case.decoder(&compute)?;
            let Trainee { trained, parameters, .. } = Trainee::new(&case, &decoder)?;
            Ok(Trainer::new(compute, decoder, trained, parameters, RouterLossOptions::default())?)
        };
        let mut one = trainer(2)?;
        let steps = case.steps()?;
        let sequences = &steps[0];
        let together = batches(sequences, false)?;
        let without = one.gradients(&together)?;
        let mut noise = RoutingNoise { share: 0.5, seed: 1, step: 7, before: Vec::new() };
        one.routing_noise = Some(noise.clone());
        let (StepLosses { logits, .. }, _) = one.gradients(&together)?;
        let (mut first, gradients) = one.gradients(&together)?;
        first.logits.clear();
        ensure!((first, gradients) == without, "{name}: noise before the logits are known");
        noise.before = logits;
        one.routing_noise = Some(noise.clone());
        let (losses, gradients) = one.gradients(&together)?;
        ensure!(losses.loads != without.0.loads && one.losses(&together)? == without.0, "{name}: noise where none is");
        kept_otherwise(&mut one, &together, &losses, &gradients)?;
        accumulated(&one, &batches(sequences, true)?, &losses, &gradients)?;
        slope_is_right(&mut one, &together, &gradients)?;
        let mut other = trainer(1)?;
        other.routing_noise = Some(noise.clone());
        ensure!(other.gradients(&together)? == (losses, gradients), "{name}: another number of threads");
        // What is only noise says nothing of the routers.
        one.routing_noise = Some(RoutingNoise { share: 0.0, ..noise });
        let (_, gradients) = one.gradients(&together)?;
        let pairs = one.parameters.iter().zip(gradients.iter());
        let (routers, others): (Vec<_>, Vec<_>) = pairs.partition(|(one, _)| one.name.contains("mlp.gate."));
        let is_nothing = |gradient: &[f32]| gradient.iter().all(|x| *x == 0.0);
        ensure!(
            !routers.is_empty() && routers.iter().all(|(_, gradient)| is_nothing(gradient)),
            "{name}: noise is learnt"
        );
        ensure!(!others.iter().all(|(_, gradient)| is_nothing(gradient)), "{name}: nothing is learnt");
    }
    Ok(())
}

macro_rules! cases {
    ($($test:ident: $name:literal,)*) => {
        $(#[test]
        fn $test() -> Result<()> {
            check($name)
        })*
    };
}

cases! {
    qwen3_moe_attention: "qwen3_moe-attention",
    qwen3_moe_experts: "qwen3_moe-experts",
    qwen3_moe_router_losses: "qwen3_moe-router-aux",
    qwen3_moe_full: "qwen3_moe-full",
    olmoe_attention: "olmoe-attention",
    olmoe_experts: "olmoe-experts",
    olmoe_router_losses: "olmoe-router-aux",
    olmoe_full: "olmoe-full",
    bailing_moe_v2_attention: "bailing_moe_v2-attention",
    bailing_moe_v2_experts: "bailing_moe_v2-experts",
    bailing_moe_v2_router_losses: "bailing_moe_v2-router-aux",
    bailing_moe_v2_full: "bailing_moe_v2-full",
}
