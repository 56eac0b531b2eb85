//! PEFT's adapters beside the base model: its logits, and the same bits in every company.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context, Result, ensure};
use cadre_engine::{
    adapter::LoadedAdapter,
    compute::Compute,
    kv::{KvCache, KvDtype, blocks::BLOCK_SIZE},
    model::{Model, SequenceRows, StepBatch, StepContext, forward},
    nn::{Decoder, Format},
    ops,
    train::places::places,
};
use cadre_models::{FormatOptions, Placement, adapter::Lora, load, open};
use candle_core::{DType, Device, Tensor};

/// Of the greatest logit.
const TOLERANCE: f32 = 1e-5;

fn fixtures() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fixtures")
}

fn adapters_of(family: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(fixtures().join("finetune/adapters"))? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(&format!("{family}-")) {
            found.push(entry.path());
        }
    }
    found.sort();
    ensure!(found.len() == 3, "adapters of {family}: {found:?}");
    Ok(found)
}

/// A sequence and the adapter that it asks for.
#[derive(Clone)]
struct Asked {
    tokens: Vec<u32>,
    adapter: Option<Arc<LoadedAdapter>>,
}

struct Runner {
    compute: Compute,
    decoder: Decoder,
    kv_dtype: KvDtype,
}

impl Runner {
    fn new(family: &str, format: Format, threads: usize) -> Result<Self> {
        let compute = Compute::new(threads);
        let folder = fixtures().join("parity").join(format!("{family}-base"));
        let checkpoint = open(folder.to_str(), &|_| {})?;
        let loaded = load(&checkpoint, &FormatOptions::all(format), Placement::Resident, &compute, &|_| {})?;
        let kv_dtype = if format == Format::F32 { KvDtype::F32 } else { KvDtype::Bf16 };
        Ok(Self { compute, decoder: loaded.decoder, kv_dtype })
    }

    fn adapter(&self, folder: &Path) -> Result<Arc<LoadedAdapter>> {
        let Lora { trained, parameters, .. } = Lora::read(folder, &self.decoder)?;
        let name = folder.file_name().context("a name")?.to_string_lossy();
        Ok(Arc::new(LoadedAdapter::new(&name, &trained, parameters, &places(&self.decoder))?))
    }

    /// The logits of all tokens, in steps of `chunk` tokens a sequence.
    fn logits(&self, asked: &[Asked], chunk: usize) -> Result<Vec<Vec<f32>>> {
        let info = self.decoder.info();
        let longest = asked.iter().map(|one| one.tokens.len()).max().unwrap_or(0);
        let blocks = longest.div_ceil(BLOCK_SIZE);
        let (heads, width) = (info.num_kv_heads, info.head_dim);
        let mut kv = KvCache::new(info.num_layers, heads, width, blocks * asked.len(), self.kv_dtype)?;
        let mut out = vec![Vec::new(); asked.len()];
        for start in (0..longest).step_by(chunk) {
            let mut batch = StepBatch::default();
            let mut owners = Vec::new();
            for (index, one) in asked.iter().enumerate().filter(|(_, one)| start < one.tokens.len()) {
                let end = one.tokens.len().min(start + chunk);
                let first = batch.token_ids.len();
                batch.token_ids.extend(&one.tokens[start..end]);
                batch.positions.extend(start as u32..end as u32);
                batch.sequences.push(SequenceRows {
                    rows: first..batch.token_ids.len(),
                    context_len: end,
                    block_table: (index * blocks..(index + 1) * blocks).map(|block| block as u32).collect(),
                    adapter: one.adapter.clone(),
                });
                owners.extend(std::iter::repeat_n(index, end - start));
            }
            batch.logit_rows = (0..batch.token_ids.len() as u32).collect();
            let lane = batch.lane();
            let mut step = StepContext { compute: &self.compute, batch: &batch, kv: &mut kv, routes: None, lane };
            let logits = forward(&self.decoder, &mut step)?.context("logits of all rows")?;
            ops::values(&logits, |values| {
                let rows = values.chunks_exact(info.vocab_size);
                owners.iter().zip(rows).for_each(|(owner, row)| out[*owner].extend_from_slice(row));
                Ok(())
            })?;
        }
        Ok(out)
    }
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|x| x.to_bits()).collect()
}

/// A sequence of a fixture, and the logits that PEFT gives it.
type Expected = (Vec<u32>, Vec<f32>);

fn expected(folder: &Path) -> Result<Vec<Expected>> {
    let tensors = candle_core::safetensors::load(folder.join("expected.safetensors"), &Device::Cpu)?;
    let tensor = |name: &str| -> Result<&Tensor> { tensors.get(name).with_context(|| name.to_owned()) };
    let tokens: Vec<Vec<u32>> = tensor("input_ids")?.to_dtype(DType::U32)?.to_vec2()?;
    Ok(tokens.into_iter().zip(tensor("logits")?.flatten_from(1)?.to_vec2()?).collect())
}

/// The logits of PEFT in f32; and in every format the bits that a sequence has alone, in a batch of all adapters and none
/// and in chunks.
fn check(family: &str) -> Result<()> {
    let folders = adapters_of(family)?;
    for format in [Format::F32, Format::Bf16, Format::Q8_0] {
        let (one, two) = (Runner::new(family, format, 1)?, Runner::new(family, format, 2)?);
        let mut asked = Vec::new();
        for folder in &folders {
            let adapter = two.adapter(folder)?;
            for (tokens, logits) in expected(folder)? {
                let own = Asked { tokens, adapter: Some(Arc::clone(&adapter)) };
                if format == Format::F32 {
                    let found = two.logits(std::slice::from_ref(&own), own.tokens.len())?.remove(0);
                    close(folder, &found, &logits)?;
                }
                asked.push(Asked { adapter: None, ..own.clone() });
                asked.push(own);
            }
        }
        let longest = asked.iter().map(|one| one.tokens.len()).max().unwrap_or(0);
        let together = two.logits(&asked, longest)?;
        for (own, logits) in asked.iter().zip(&together) {
            let alone = one.logits(std::slice::from_ref(own), longest)?.remove(0);
            ensure!(bits(&alone) == bits(logits), "{format}: a neighbour changes {:?}", own.adapter);
        }
        for chunk in [1, 3, 5] {
            let chunked = one.logits(&asked, chunk)?;
            ensure!(chunked.concat() == together.concat(), "{format}: chunks of {chunk} change the logits");
        }
        let differ = together.chunks_exact(2).filter(|pair| pair[0] != pair[1]).count();
        ensure!(differ == asked.len() / 2, "{format}: an adapter changes nothing");
    }
    Ok(())
}

fn close(folder: &Path, found: &[f32], expected: &[f32]) -> Result<()> {
    let greatest = expected.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
    ensure!(found.len() == expected.len(), "{}: {} logits", folder.display(), found.len());
    for (found, expected) in found.iter().zip(expected) {
        let difference = (found - expected).abs();
        ensure!(difference <= TOLERANCE * greatest, "{}: {found}, expected {expected}", folder.display());
    }
    Ok(())
}

#[test]
fn qwen3_moe() -> Result<()> {
    check("qwen3_moe")
}

#[test]
fn olmoe() -> Result<()> {
    check("olmoe")
}

#[test]
fn an_adapter_of_another_model_is_refused() -> Result<()> {
    let runner = Runner::new("olmoe", Format::F32, 1)?;
    for folder in adapters_of("qwen3_moe")? {
        let error = runner.adapter(&folder).err().context("it fits")?.to_string();
        ensure!(error.contains("adapter_model.safetensors"), "{error}");
    }
    Ok(())
}
