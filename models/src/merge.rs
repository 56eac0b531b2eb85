//! Merging: a checkpoint becomes one that computes without an adapter what it computed with it.
//!
//! Each adapted tensor becomes W + scale · B · A, computed in f32 and rounded once to the type that it is stored in.
//!
//! Training changes everything that every token passes, so an adapter that adds nothing there is not what one believes
//! it is, and merging it would give the model from before without a word: that is an error, as is what is lost in
//! rounding from first to last number. A routed expert may have seen no token, and its B is still 0: it is listed as
//! unchanged. That none of a layer's experts has changed is an error again, because a token uses some of them.

use std::{
    collections::{BTreeMap, HashSet},
    ops::Range,
    path::Path,
};

use cadre_engine::{
    compute::Compute,
    train::{
        parameters::Parameters,
        places::{Place, places},
        trained::Adapter,
    },
};

use crate::{
    Error, FormatOptions, Placement, Result,
    adapter::Lora,
    checkpoint::Checkpoint,
    load::outline,
    rewrite::{Changes, Rewriting, Rewritten, TensorChange, plain_tensors, rewrite},
};

/// Writes `checkpoint` with the adapter in the directory `adapter` merged into its weights. Beside a few MiB of weights,
/// the adapter is in memory.
///
/// # Errors
/// When the adapter can't be read, is of another model, or changes nothing where it should; when the checkpoint is a pack
/// or can't be read; when the output holds something else or can't be written to.
pub fn merge(
    checkpoint: &Checkpoint,
    adapter: &Path,
    compute: &Compute,
    rewriting: &Rewriting<'_>,
) -> Result<Rewritten> {
    let tensors = plain_tensors(checkpoint)?;
    let options = FormatOptions { format: None, experts: None, dense: None };
    let decoder = outline(checkpoint, &options, Placement::Resident, compute)?.decoder;
    let Lora { trained, parameters, .. } = Lora::read(adapter, &decoder)?;
    let mut additions: BTreeMap<String, Addition<'_>> = BTreeMap::new();
    for info in places(&decoder) {
        let mut start = 0;
        for module in &info.modules {
            let own = start..start + module.rows;
            start = own.end;
            let name = format!("{}.weight", module.name);
            let adapters = trained.of(info.place).adapters.iter();
            for adapter in adapters.filter(|one| one.rows.start <= own.start && own.end <= one.rows.end) {
                if info.place == Place::Head && !decoder.has_plain_head() {
                    return Err(Error::HeadNotMerged { tensor: name });
                }
                let first = own.start - adapter.rows.start;
                let addition = Addition { adapter, rows: first..first + module.rows, group: group(info.place, &name) };
                additions.insert(name.clone(), addition);
            }
        }
    }
    let adding = additions.iter().filter(|(_, addition)| addition.is_something(&parameters));
    refuse_idle(&additions, &adding.map(|(name, _)| name.as_str()).collect(), |tensor| Error::NothingAdded {
        adapter: adapter.display().to_string(),
        tensor,
    })?;
    let mut changes = Changes::new();
    for (name, Addition { adapter, rows: own, .. }) in &additions {
        let parameters = &parameters;
        let add = move |rows: Range<usize>, weight: &mut [f32]| {
            adapter.add_to(compute, parameters, own.start + rows.start..own.start + rows.end, weight);
        };
        changes.insert(name.clone(), Box::new(add));
    }
    let check = |found: &[TensorChange]| {
        let changed = found.iter().filter(|change| change.changed > 0).map(|change| change.name.as_str());
        refuse_idle(&additions, &changed.collect(), |tensor| Error::LostInRounding { tensor })
    };
    rewrite(checkpoint, &tensors, &changes, &check, rewriting)
}

/// What is added to a tensor.
struct Addition<'a> {
    adapter: &'a Adapter,
    /// The tensor's rows among those of the adapter.
    rows: Range<usize>,
    /// The tensors of which at least one changes in training.
    group: String,
}

impl Addition<'_> {
    /// Whether neither factor is zero.
    fn is_something(&self, parameters: &Parameters) -> bool {
        let Adapter { a, b, rank, .. } = self.adapter;
        let some = |values: &[f32]| values.iter().any(|value| *value != 0.0);
        some(&parameters.get(*a).values)
            && some(&parameters.get(*b).values[self.rows.start * rank..self.rows.end * rank])
    }
}

/// A tensor that all tokens pass is a group by itself; `….experts.*.down_proj.weight` are one.
fn group(place: Place, name: &str) -> String {
    let (Place::GateUp { expert, .. } | Place::Down { expert, .. }) = place else { return name.to_owned() };
    let expert = format!(".experts.{expert}.");
    name.replace(&expert, ".experts.*.")
}

/// Refuses groups none of whose tensors is among the `busy` ones.
fn refuse_idle(
    additions: &BTreeMap<String, Addition<'_>>,
    busy: &HashSet<&str>,
    refuse: impl Fn(String) -> Error,
) -> Result<()> {
    let groups: HashSet<&str> =
        busy.iter().filter_map(|name| additions.get(*name)).map(|addition| addition.group.as_str()).collect();
    match additions.values().find(|addition| !groups.contains(addition.group.as_str())) {
        None => Ok(()),
        Some(idle) => Err(refuse(idle.group.clone())),
    }
}

#[cfg(test)]
mod tests;
