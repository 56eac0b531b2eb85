//! The examples of a run, and which of them make which step.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use cadre_engine::train::{Batch, order::shuffled};
use cadre_models::{
    ChatTemplate, Tokenizer,
    dataset::{self, Dataset, DatasetOptions, Example},
};

use super::settings::Settings;

/// Tokens that go through the model at once where no step says how many.
pub const TOKENS_AT_ONCE: usize = 4096;

/// Examples, and what counts as one in a batch.
pub struct Data {
    /// The examples.
    pub dataset: Dataset,
    /// Those that count as one together: with packing several, else one each.
    units: Vec<Vec<usize>>,
    /// Units of a step.
    per_step: usize,
    seed: u64,
}

impl Data {
    /// Reads `files`.
    ///
    /// # Errors
    /// When lines are broken, all of them are told.
    pub fn read(
        files: &[PathBuf],
        settings: &Settings,
        max_length: usize,
        tokenizer: &Tokenizer,
        template: Option<&ChatTemplate>,
    ) -> Result<Self> {
        let options = DatasetOptions { max_length, loss_on: settings.loss_on, skip_bad: settings.skip_bad };
        let dataset = dataset::read(files, tokenizer, template, &options)?;
        let lengths: Vec<usize> = dataset.examples.iter().map(|example| example.tokens.len()).collect();
        let units = if settings.packing {
            dataset::pack(&lengths, max_length)
        } else {
            (0..lengths.len()).map(|index| vec![index]).collect()
        };
        Ok(Self { dataset, units, per_step: settings.batch_size * settings.grad_accum, seed: settings.seed })
    }

    /// The examples.
    pub fn examples(&self) -> &[Example] {
        &self.dataset.examples
    }

    /// What counts as one in a batch.
    pub fn units(&self) -> usize {
        self.units.len()
    }

    /// The steps of so many epochs; an epoch's last step may be smaller.
    pub fn steps(&self, epochs: f64) -> u64 {
        let per_epoch = self.units.len().div_ceil(self.per_step);
        (epochs * per_epoch as f64).ceil() as u64
    }

    /// The epochs that are through after so many batches were drawn.
    pub fn epoch_after(&self, drawn: u64) -> f64 {
        drawn as f64 / self.units.len().div_ceil(self.per_step) as f64
    }

    /// The examples of batch number `drawn`.
    pub fn draw(&self, drawn: u64) -> Vec<u64> {
        let per_epoch = self.units.len().div_ceil(self.per_step) as u64;
        let order = shuffled(self.seed, drawn / per_epoch, self.units.len());
        let start = (drawn % per_epoch) as usize * self.per_step;
        let units = &order[start..order.len().min(start + self.per_step)];
        units.iter().flat_map(|unit| &self.units[*unit]).map(|index| *index as u64).collect()
    }

    /// The numbers of all examples in order, in groups of at most `tokens` tokens; a longer example is one by itself.
    pub fn chunks(&self, tokens: usize) -> Vec<Vec<u64>> {
        let (mut chunks, mut taken) = (Vec::<Vec<u64>>::new(), 0);
        for (number, example) in (0..).zip(self.examples()) {
            taken += example.tokens.len();
            match chunks.last_mut() {
                Some(chunk) if taken <= tokens => chunk.push(number),
                _ => {
                    chunks.push(vec![number]);
                    taken = example.tokens.len();
                }
            }
        }
        chunks
    }

    /// The most tokens that a step may have, those of one of its `parts`, and those of an example.
    pub fn most_tokens(&self, parts: usize) -> [usize; 3] {
        let tokens = |unit: &Vec<usize>| unit.iter().map(|index| self.examples()[*index].tokens.len()).sum::<usize>();
        let mut sizes: Vec<usize> = self.units.iter().map(tokens).collect();
        sizes.sort_unstable_by(|one, other| other.cmp(one));
        let longest = self.examples().iter().map(|example| example.tokens.len()).max().unwrap_or(0);
        let step: usize = sizes.iter().take(self.per_step).sum();
        [step, (step.div_ceil(parts) + longest).min(step), longest]
    }
}

/// The examples of these numbers in `parts` batches of about as many tokens each.
///
/// # Errors
/// When there is no such example.
pub fn batches(examples: &[Example], numbers: &[u64], parts: usize) -> Result<Vec<Batch>> {
    let find =
        |number: &u64| usize::try_from(*number).ok().and_then(|index| examples.get(index)).context("no such example");
    let chosen: Vec<&Example> = numbers.iter().map(find).collect::<Result<_>>()?;
    let total: usize = chosen.iter().map(|example| example.tokens.len()).sum();
    let mut batches = vec![Batch::default()];
    for example in chosen {
        let full = batches.last().is_some_and(|batch| batch.tokens() * parts >= total && batch.tokens() > 0);
        if full && batches.len() < parts {
            batches.push(Batch::default());
        }
        if let Some(batch) = batches.last_mut() {
            batch.push(&example.tokens, &example.targets)?;
        }
    }
    ensure!(batches.iter().any(|batch| !batch.targets.is_empty()), "a batch without a target token");
    Ok(batches)
}
