//! From the names that a user gives to the matrices that get an adapter.

use std::collections::BTreeSet;

use cadre_engine::{
    nn::Decoder,
    train::{
        places::{Place, PlaceInfo, places},
        trained::initial_a,
    },
};

use super::{AdapterConfig, AdapterLayout, At, Entry, Lora, Part, stack_of};
use crate::{
    Error, Result,
    targets::{ALL_LINEAR, is_linear, names, no_such_target},
};

/// New adapters.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraOptions {
    /// The rank of each.
    pub rank: usize,
    /// The product is multiplied with `alpha / rank`, or with `alpha / √rank` if `rslora`.
    pub alpha: f64,
    /// Rank-stabilised (Kalajdzievski, arXiv:2312.03732).
    pub rslora: bool,
    /// The probability that a value of an adapter's input is dropped in training.
    pub dropout: f64,
    /// Names of modules as on the hub, or of what holds them (`experts`, `self_attn`), or [`ALL_LINEAR`].
    pub targets: Vec<String>,
    /// How experts' adapters are laid out.
    pub layout: AdapterLayout,
    /// What A begins from; B begins from zero.
    pub seed: u64,
}

impl LoraOptions {
    fn scale(&self) -> f32 {
        let rank = self.rank as f64;
        (self.alpha / if self.rslora { rank.sqrt() } else { rank }) as f32
    }
}

/// Adapters that a decoder is to get; none of their numbers is in memory.
#[derive(Debug)]
pub struct LoraPlan {
    config: AdapterConfig,
    entries: Vec<Entry>,
    seed: u64,
}

impl LoraPlan {
    /// Adapters of the modules that `options` name.
    ///
    /// # Errors
    /// When a name matches nothing, or one half only of what a fused adapter covers.
    pub fn new(decoder: &Decoder, base_model: &str, options: &LoraOptions) -> Result<Self> {
        let places = places(decoder);
        let mut entries = Vec::new();
        let mut found = BTreeSet::new();
        for info in &places {
            entries.extend(entries_of(info, &places, options, &mut found)?);
        }
        if let Some(target) = options.targets.iter().find(|target| !found.contains(target.as_str())) {
            let modules = places.iter().flat_map(|info| &info.modules);
            return Err(no_such_target(target, modules.map(|module| module.name.as_str())));
        }
        let config = AdapterConfig::describe(base_model, options, &places, &entries);
        let parameters = config.target_parameters.iter().flatten().cloned().collect::<Vec<_>>();
        if options.dropout > 0.0 && !parameters.is_empty() {
            return Err(Error::DropoutOnParameters { parameters: parameters.join(", ") });
        }
        Ok(Self { config, entries, seed: options.seed })
    }

    /// How many numbers they have; `u64::MAX` if more than that.
    #[must_use]
    pub fn numbers(&self) -> u64 {
        let of = |entry: &Entry| (entry.rank as u64).saturating_mul((entry.inputs + entry.rows.len()) as u64);
        self.entries.iter().map(of).fold(0, u64::saturating_add)
    }

    /// The matrices that they adapt, each once.
    #[must_use]
    pub fn places(&self) -> Vec<Place> {
        let mut places: Vec<Place> = self.entries.iter().map(|entry| entry.place).collect();
        places.dedup();
        places
    }

    /// The adapters as they are before the first step.
    ///
    /// # Errors
    /// When they are too large.
    pub fn build(self) -> Result<Lora> {
        let seed = self.seed;
        Lora::assemble(self.config, self.entries, |index, entry| {
            let a = initial_a(seed, index as u64, entry.rank, entry.inputs);
            Ok([a, vec![0.0; entry.rows.len() * entry.rank]])
        })
    }
}

/// The targets that `module` of this place matches.
fn matching<'a>(options: &'a LoraOptions, place: Place, module: &str) -> Vec<&'a str> {
    let targets = options.targets.iter().map(String::as_str);
    targets.filter(|target| if *target == ALL_LINEAR { is_linear(place) } else { names(target, module) }).collect()
}

/// The adapters of one place; the targets that they match join `found`.
fn entries_of<'a>(
    info: &PlaceInfo,
    places: &[PlaceInfo],
    options: &'a LoraOptions,
    found: &mut BTreeSet<&'a str>,
) -> Result<Vec<Entry>> {
    let entry = |rows, at| {
        let (rank, scale) = (options.rank, options.scale());
        Entry { place: info.place, rows, inputs: info.inputs, rank, scale, at }
    };
    let stack = stack_of(info, places).filter(|_| options.layout == AdapterLayout::Fused);
    if let Some((experts, part, expert, count)) = stack {
        // The stack's own name counts too.
        let fused = matching(options, info.place, &format!("{experts}.{}", part.name()));
        let modules: Vec<_> = info.modules.iter().map(|m| matching(options, info.place, &m.name)).collect();
        found.extend(fused.iter().chain(modules.iter().flatten()));
        let matched = modules.iter().filter(|targets| !targets.is_empty()).count();
        if fused.is_empty() && matched == 0 {
            return Ok(Vec::new());
        }
        if fused.is_empty() && matched < modules.len() {
            return Err(Error::HalfTarget { module: info.modules[0].name.clone() });
        }
        return Ok(vec![entry(0..info.outputs(), At::Stack { experts, part, expert, count })]);
    }
    let (mut start, mut entries) = (0, Vec::new());
    for module in &info.modules {
        let rows = start..start + module.rows;
        start = rows.end;
        let matched = matching(options, info.place, &module.name);
        if !matched.is_empty() {
            entries.push(entry(rows, At::Module(module.name.clone())));
        }
        found.extend(matched);
    }
    Ok(entries)
}

impl Part {
    /// What PEFT calls the stacked parameter.
    pub(super) fn target(self) -> String {
        format!("mlp.experts.{}", self.name())
    }
}
