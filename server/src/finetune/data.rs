//! The examples of a run, and which of them make which step.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use cadre_engine::train::{Batch, Trainer, order::shuffled};
use cadre_models::{
    ChatTemplate, Tokenizer,
    dataset::{self, BadLine, Dataset, DatasetOptions, Example},
};

use super::settings::Settings;

/// How many tokens go through the model together at most: in a step, and in looking at data by the same memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepSize {
    /// Those of a step.
    pub tokens: usize,
    /// The batches of a step.
    pub batches: usize,
    /// Those of one batch.
    pub batch_tokens: usize,
    /// Those of an example.
    pub longest: usize,
}

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
    /// Reads `files`; `on_bad` is told of each broken line.
    ///
    /// # Errors
    /// When lines are broken, and aren't to be skipped.
    pub fn read(
        files: &[PathBuf],
        settings: &Settings,
        max_length: usize,
        tokenizer: &Tokenizer,
        template: Option<&ChatTemplate>,
        on_bad: &mut dyn FnMut(&BadLine),
    ) -> Result<Self> {
        let options = DatasetOptions { max_length, loss_on: settings.loss_on, skip_bad: settings.skip_bad };
        let dataset = dataset::read(files, tokenizer, template, &options, on_bad)?;
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

    /// How many of the first examples have at most so many tokens together; at least one.
    pub fn first(&self, tokens: usize) -> usize {
        let mut taken = 0;
        let fits = |example: &&Example| {
            taken += example.tokens.len();
            taken <= tokens
        };
        self.examples().iter().take_while(fits).count().max(1)
    }

    /// The first `count` examples in order, as the batches of steps of that size; a longer example is a step by itself.
    pub fn steps_of_first(&self, count: usize, size: StepSize) -> impl Iterator<Item = Result<Vec<Batch>>> {
        let (mut groups, mut taken) = (Vec::<Vec<u64>>::new(), 0);
        for (number, example) in (0..).zip(self.examples().iter().take(count)) {
            taken += example.tokens.len();
            match groups.last_mut() {
                Some(group) if taken <= size.tokens => group.push(number),
                _ => {
                    groups.push(vec![number]);
                    taken = example.tokens.len();
                }
            }
        }
        groups.into_iter().map(move |numbers| batches(self.examples(), &numbers, size.batches))
    }

    /// The most tokens that go through the model together in steps of `parts` batches, and in looking at the examples of
    /// `eval`.
    pub fn step_size(&self, parts: usize, eval: Option<&Self>) -> StepSize {
        let tokens = |unit: &Vec<usize>| unit.iter().map(|index| self.examples()[*index].tokens.len()).sum::<usize>();
        let mut sizes: Vec<usize> = self.units.iter().map(tokens).collect();
        sizes.sort_unstable_by(|one, other| other.cmp(one));
        let examples = self.examples().iter().chain(eval.into_iter().flat_map(Self::examples));
        let longest = examples.map(|example| example.tokens.len()).max().unwrap_or(0);
        let tokens = sizes.iter().take(self.per_step).sum::<usize>().max(longest);
        let batch_tokens = (tokens.div_ceil(parts) + longest).min(tokens);
        StepSize { tokens, batches: parts, batch_tokens, longest }
    }
}

/// How often each expert of each layer is chosen for the first examples of `data` with up to so many tokens; empty for layers
/// without a router.
///
/// # Errors
/// When an expert can't be read.
pub fn expert_loads(trainer: &Trainer, data: &Data, tokens: usize, size: StepSize) -> Result<Vec<Vec<u64>>> {
    let mut sums = Vec::<Vec<u64>>::new();
    for batches in data.steps_of_first(data.first(tokens), size) {
        let loads = trainer.loads(&batches?)?;
        sums.resize(loads.len(), Vec::new());
        for (sum, load) in sums.iter_mut().zip(loads) {
            sum.resize(load.len(), 0);
            sum.iter_mut().zip(load).for_each(|(sum, count)| *sum += count);
        }
    }
    Ok(sums)
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    /// Data of examples of these lengths, two of which make a step.
    fn data(lengths: &[usize]) -> Data {
        let example = |length: &usize| Example {
            tokens: vec![7; *length],
            targets: (0..*length).map(|index| index > 0).collect(),
            file: Arc::from("a.jsonl"),
            line: 1,
            cut_tokens: 0,
        };
        let examples: Vec<Example> = lengths.iter().map(example).collect();
        let units = (0..examples.len()).map(|index| vec![index]).collect();
        Data { dataset: Dataset { examples, ..Dataset::default() }, units, per_step: 2, seed: 1 }
    }

    #[test]
    fn what_is_looked_at_goes_through_in_pieces_of_a_step() {
        let (train, held_out) = (data(&[4, 3, 5, 2, 2]), data(&[3, 3, 3, 12, 3, 2, 2, 9, 2]));
        assert_eq!(train.step_size(2, None), StepSize { tokens: 9, batches: 2, batch_tokens: 9, longest: 5 });
        let size = train.step_size(2, Some(&held_out));
        assert_eq!(size, StepSize { tokens: 12, batches: 2, batch_tokens: 12, longest: 12 });
        let size = StepSize { tokens: 9, batches: 2, batch_tokens: 9, longest: 5 };
        let pieces: Vec<Vec<Batch>> = held_out.steps_of_first(9, size).collect::<Result<_>>().unwrap();
        let sizes: Vec<Vec<usize>> = pieces.iter().map(|piece| piece.iter().map(Batch::tokens).collect()).collect();
        assert_eq!(sizes, [vec![6, 3], vec![12], vec![5, 2], vec![9], vec![2]]);
        assert_eq!(held_out.steps_of_first(2, size).count(), 1);
    }

    #[test]
    fn the_first_examples_are_as_many_as_have_so_many_tokens() {
        let data = data(&[4, 3, 5, 2]);
        assert_eq!([3, 4, 7, 11, 12, 99].map(|tokens| data.first(tokens)), [1, 1, 2, 2, 3, 4]);
    }
}
