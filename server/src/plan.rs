//! What a model can be expected to do on a machine within a budget: arithmetic over the model's sizes, what was
//! measured of the machine, and how often each expert is used. [`crate::measure`] measures, `cadre plan` and
//! `cadre bench` show.
//!
//! Two kinds of figures: *bounds*, what the machine allows (each weight of a step read once, from memory or from the disk, or its
//! multiply-adds), and *predictions*, from how long the parts of a step took when they were timed.

use cadre_engine::{experts::StoreCounters, model::ModelInfo, nn::StepTimes};
use cadre_models::Checkpoint;
use serde::{Deserialize, Serialize};

/// What was measured of a machine for one model. Rates are of all threads together.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// Bytes per second from memory.
    pub read_bandwidth: f64,
    /// Operations per second, two a multiply-add.
    pub matrix_rate: f64,
    /// Steps of the model's own shapes.
    pub steps: Vec<Step>,
    /// Reads of the pack's experts, by how many are asked for at once; empty if that was not needed.
    pub reads: Vec<Reads>,
}

/// [`StepTimes`] that can be kept.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Step {
    pub tokens: usize,
    pub layer_seconds: f64,
    pub head_seconds: f64,
    pub head_rows: usize,
    pub expert_seconds: f64,
    pub rows_per_expert: f64,
}

impl From<StepTimes> for Step {
    fn from(times: StepTimes) -> Self {
        let StepTimes { tokens, layer_seconds, head_seconds, head_rows, expert_seconds, rows_per_expert } = times;
        Self { tokens, layer_seconds, head_seconds, head_rows, expert_seconds, rows_per_expert }
    }
}

/// How long it takes to read so many experts that are asked for at once.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Reads {
    pub experts: usize,
    pub bytes: u64,
    pub seconds: f64,
}

impl Reads {
    /// Bytes per second.
    fn bandwidth(&self) -> f64 {
        self.bytes as f64 / self.seconds
    }
}

impl Machine {
    /// Bytes per second from the disk, with many reads in flight.
    pub fn disk_bandwidth(&self) -> Option<f64> {
        self.most_in_flight().map(Reads::bandwidth)
    }

    /// The better of two measurements, each limit for itself; the steps are this one's.
    pub fn max(mut self, other: Self) -> Self {
        self.read_bandwidth = self.read_bandwidth.max(other.read_bandwidth);
        self.matrix_rate = self.matrix_rate.max(other.matrix_rate);
        for other in other.reads {
            match self.reads.iter_mut().find(|reads| reads.experts == other.experts) {
                Some(reads) if reads.bandwidth() >= other.bandwidth() => {}
                Some(reads) => *reads = other,
                None => self.reads.push(other),
            }
        }
        self
    }

    /// Its limits, for people.
    pub fn limits(&self) -> String {
        let (memory, rate) = (self.read_bandwidth / 1e9, self.matrix_rate / 1e9);
        let disk = self.disk_bandwidth().map(|disk| format!(", {:.2} GB/s from the disk", disk / 1e9));
        format!("{memory:.1} GB/s from memory, {rate:.0} G operations/s{}", disk.unwrap_or_default())
    }

    /// Seconds that an expert takes to read, with many reads in flight: of a checkpoint that isn't packed that is more than
    /// its packed bytes.
    fn read(&self) -> f64 {
        self.most_in_flight().map_or(0.0, |reads| reads.seconds / reads.experts as f64)
    }

    fn most_in_flight(&self) -> Option<&Reads> {
        self.reads.iter().max_by_key(|reads| reads.experts)
    }

    /// Seconds in all layers for all but routed experts.
    fn layers(&self, tokens: f64) -> f64 {
        along(self.steps.iter().map(|step| (step.tokens as f64, step.layer_seconds)), tokens)
    }

    fn head(&self, rows: f64) -> f64 {
        along(self.steps.iter().map(|step| (step.head_rows as f64, step.head_seconds)), rows)
    }

    /// Seconds for one expert that so many tokens use.
    fn expert(&self, rows: f64) -> f64 {
        along(self.steps.iter().map(|step| (step.rows_per_expert, step.expert_seconds)), rows)
    }

    fn reads(&self, experts: f64) -> f64 {
        along(self.reads.iter().map(|reads| (reads.experts as f64, reads.seconds)), experts)
    }
}

/// The value at `x` of the line through `points`; before the first and after the last it goes on in proportion.
fn along(points: impl Iterator<Item = (f64, f64)>, x: f64) -> f64 {
    let mut points: Vec<_> = points.collect();
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    let after = points.partition_point(|point| point.0 < x);
    match (after.checked_sub(1).map(|before| points[before]), points.get(after)) {
        (Some((x0, y0)), Some((x1, y1))) => y0 + (x - x0) / (x1 - x0) * (y1 - y0),
        (Some((end, y)), None) | (None, Some(&(end, y))) => y * x / end,
        (None, None) => 0.0,
    }
}

/// A model within its limits.
#[derive(Debug, Clone)]
pub struct Work {
    model: ModelInfo,
    max_num_batched_tokens: usize,
    /// How likely a token is to use each expert, by layer.
    likelihoods: Vec<Vec<f64>>,
    slots: Option<usize>,
    has_profile: bool,
}

/// What a step does with its experts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Usage {
    /// Different ones, in all layers together.
    pub distinct: f64,
    /// Their bytes.
    bytes: f64,
    /// The part of them that is in memory.
    pub hit_rate: f64,
}

/// How a step's experts fared when that was counted.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Seen {
    /// Different ones, in all layers together.
    pub distinct: f64,
    /// The part of them that was in memory.
    pub hit_rate: f64,
}

impl Seen {
    /// What a store counted.
    pub fn of(counters: &StoreCounters) -> Self {
        Self { distinct: counters.active_per_step.mean(), hit_rate: counters.hit_rate() }
    }
}

/// Tokens per second.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Speed {
    /// What is to be expected.
    pub predicted: f64,
    /// What the machine allows if it reads memory and disk one after the other.
    pub bound: f64,
}

impl Work {
    /// A model whose routing is even. `slots`: of the store, if not all experts are in memory.
    pub fn new(model: ModelInfo, max_num_batched_tokens: usize, slots: Option<usize>) -> Self {
        let even = |experts: usize, top_k: usize| vec![top_k as f64 / experts as f64; experts];
        let likelihoods = model.moe_layers.iter().map(|layer| even(layer.experts, layer.top_k)).collect();
        Self { model, max_num_batched_tokens, likelihoods, slots, has_profile: false }
    }

    /// The same with the routing that `uses` tell of, `[layer][expert]`; as it was if they are of another model.
    pub fn with_profile(mut self, uses: &[Vec<u32>]) -> Self {
        let sizes = self.model.moe_layers.iter().map(|layer| layer.experts);
        if sizes.ne(uses.iter().map(Vec::len)) {
            return self;
        }
        for ((layer, uses), likelihoods) in self.model.moe_layers.iter().zip(uses).zip(&mut self.likelihoods) {
            let sum: f64 = uses.iter().map(|uses| f64::from(*uses)).sum();
            if sum > 0.0 {
                let share = |uses: &u32| layer.top_k as f64 * f64::from(*uses) / sum;
                *likelihoods = uses.iter().map(|uses| share(uses).min(1.0)).collect();
            }
        }
        self.has_profile = true;
        self
    }

    /// The same with the profile beside the model, if there is one.
    pub fn with_profile_of(self, checkpoint: &Checkpoint) -> Self {
        // One that can't be read is told of when it is to be used.
        let profile = checkpoint.routing_profile().ok().flatten().and_then(|kept| kept.read().ok().flatten());
        match profile {
            Some(uses) => self.with_profile(&uses),
            None => self,
        }
    }

    /// Whether its routing is that of a profile.
    pub fn has_profile(&self) -> bool {
        self.has_profile
    }

    /// What a step of `tokens` tokens does.
    pub fn usage(&self, tokens: usize) -> Usage {
        let used = |likelihood: &f64| 1.0 - (1.0 - likelihood).powf(tokens as f64);
        let uses: Vec<Vec<f64>> = self.likelihoods.iter().map(|layer| layer.iter().map(used).collect()).collect();
        let layers = uses.iter().zip(&self.model.moe_layers);
        let bytes = layers.map(|(uses, layer)| uses.iter().sum::<f64>() * layer.expert_bytes as f64).sum();
        let distinct = uses.iter().flatten().sum();
        // What is held is what single tokens use most, whatever the step: prompts move nothing.
        let mut experts: Vec<(f64, f64)> =
            self.likelihoods.iter().flatten().copied().zip(uses.into_iter().flatten()).collect();
        experts.sort_by(|a, b| b.0.total_cmp(&a.0));
        let hit_rate = self.slots.map_or(1.0, |slots| hit_rate(experts.into_iter().map(|(_, uses)| uses), slots));
        Usage { distinct, bytes, hit_rate }
    }

    /// What a step of `tokens` tokens does if it is as one that was `seen`.
    fn usage_as(&self, tokens: usize, seen: Option<Seen>) -> Usage {
        let usage = self.usage(tokens);
        let Some(Seen { distinct, hit_rate }) = seen.filter(|seen| seen.distinct > 0.0) else { return usage };
        Usage { distinct, bytes: usage.bytes * distinct / usage.distinct, hit_rate }
    }

    /// Of `batch` sequences that decode together, in steps as the one that was `seen`, if one was.
    pub fn decode(&self, batch: usize, seen: Option<Seen>, machine: &Machine) -> Speed {
        let usage = self.usage_as(batch, seen);
        let seconds = self.step_seconds(batch, usage, machine) + machine.head(batch as f64);
        let least = self.least_seconds(usage, self.model.dense_bytes, self.operations(batch, batch), machine);
        Speed { predicted: batch as f64 / seconds, bound: batch as f64 / least }
    }

    /// Of a prompt of so many tokens, which goes in steps of `max_num_batched_tokens`; the head takes part once.
    /// Hits are those that were `seen`, if they were.
    pub fn prefill(&self, prompt: usize, seen: Option<Seen>, machine: &Machine) -> Speed {
        let (full, rest) = (prompt / self.max_num_batched_tokens, prompt % self.max_num_batched_tokens);
        let steps = [(self.max_num_batched_tokens, full), (rest, usize::from(rest > 0))];
        let body_bytes = self.model.dense_bytes - self.model.head_bytes;
        let (mut seconds, mut least) = (machine.head(1.0), 0.0);
        let head = self.model.head_bytes as f64 / machine.read_bandwidth;
        for (tokens, count) in steps.into_iter().filter(|(_, count)| *count > 0) {
            let usage = self.usage(tokens);
            let usage = Usage { hit_rate: seen.map_or(usage.hit_rate, |seen| seen.hit_rate), ..usage };
            seconds += count as f64 * self.step_seconds(tokens, usage, machine);
            least += count as f64 * self.least_seconds(usage, body_bytes, self.operations(tokens, 0), machine);
        }
        Speed { predicted: prompt as f64 / seconds, bound: prompt as f64 / (least + head) }
    }

    /// What a step of `tokens` tokens, of which `scored` have logits, multiplies and adds.
    fn operations(&self, tokens: usize, scored: usize) -> f64 {
        let body = (self.model.active_parameters - self.model.head_parameters) as f64;
        2.0 * (body * tokens as f64 + self.model.head_parameters as f64 * scored as f64)
    }

    /// What the machine needs: each weight once from memory, or if it is missing once from the disk; or the
    /// multiply-adds. Reading both at once may beat it.
    fn least_seconds(&self, usage: Usage, dense_bytes: u64, operations: f64, machine: &Machine) -> f64 {
        let memory = (dense_bytes as f64 + usage.bytes * usage.hit_rate) / machine.read_bandwidth;
        let disk = usage.distinct * (1.0 - usage.hit_rate) * machine.read();
        (memory + disk).max(operations / machine.matrix_rate)
    }

    /// What a step without its head takes.
    fn step_seconds(&self, tokens: usize, usage: Usage, machine: &Machine) -> f64 {
        let layers = self.model.moe_layers.len() as f64;
        let distinct = usage.distinct / layers.max(1.0);
        let top_k = self.model.moe_layers.first().map_or(0, |layer| layer.top_k);
        let each = machine.expert((tokens * top_k) as f64 / distinct.max(1.0));
        let computing = distinct * each;
        // Those that are there compute while the others are read; the last one to land is computed alone. How many are
        // missing differs from layer to layer, and a layer can't use the time in which another one reads nothing.
        let with_missing = |missing: usize| match missing {
            0 => computing,
            _ => computing.max(machine.reads(missing as f64) + each),
        };
        let likelihoods = binomial(distinct.round() as usize, 1.0 - usage.hit_rate);
        let experts: f64 =
            likelihoods.enumerate().map(|(missing, likelihood)| likelihood * with_missing(missing)).sum();
        machine.layers(tokens as f64) + layers * experts
    }
}

/// How likely 0, 1, … `count` of so many happen, each of which does with `likelihood`.
fn binomial(count: usize, likelihood: f64) -> impl Iterator<Item = f64> {
    let mut likelihoods = vec![0.0; count + 1];
    likelihoods[0] = 1.0;
    for tried in 1..=count {
        for happened in (0..=tried).rev() {
            let before = if happened > 0 { likelihoods[happened - 1] * likelihood } else { 0.0 };
            likelihoods[happened] = before + likelihoods[happened] * (1.0 - likelihood);
        }
    }
    likelihoods.into_iter()
}

/// The part of a step's uses that find their expert in a slot: the first of the experts have slots. `uses`: how likely
/// the step is to use each.
fn hit_rate(uses: impl Iterator<Item = f64>, slots: usize) -> f64 {
    let (mut held, mut all) = (0.0, 0.0);
    for (index, uses) in uses.enumerate() {
        all += uses;
        held += if index < slots { uses } else { 0.0 };
    }
    if all > 0.0 { held / all } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use cadre_engine::model::MoeLayerInfo;

    use super::*;

    /// A layer of 4 experts, of which a token uses 2, and a head of a tenth of the rest.
    fn model() -> ModelInfo {
        ModelInfo {
            num_layers: 1,
            hidden_size: 1,
            vocab_size: 1,
            num_kv_heads: 1,
            head_dim: 1,
            max_position_embeddings: 1,
            total_parameters: 0,
            active_parameters: 110_000_000,
            head_parameters: 10_000_000,
            weight_bytes: 0,
            dense_bytes: 200_000_000,
            head_bytes: 50_000_000,
            moe_layers: vec![MoeLayerInfo { experts: 4, top_k: 2, expert_bytes: 400_000_000 }],
        }
    }

    fn step(tokens: usize, rows_per_expert: f64) -> Step {
        let count = tokens as f64;
        Step {
            tokens,
            layer_seconds: 0.01 * count,
            head_seconds: 0.001 * count,
            head_rows: tokens,
            expert_seconds: 0.02 * rows_per_expert,
            rows_per_expert,
        }
    }

    /// Reads of 1 and 4 experts, at 4 GB/s once several are asked for.
    fn machine() -> Machine {
        Machine {
            read_bandwidth: 1e11,
            matrix_rate: 1e12,
            steps: vec![step(1, 1.0), step(4, 2.0)],
            reads: vec![
                Reads { experts: 1, bytes: 400_000_000, seconds: 0.2 },
                Reads { experts: 4, bytes: 1_600_000_000, seconds: 0.4 },
            ],
        }
    }

    fn work(slots: Option<usize>) -> Work {
        Work::new(model(), 512, slots)
    }

    #[track_caller]
    fn equal(found: f64, expected: f64) {
        assert!((found / expected - 1.0).abs() < 1e-6, "expected {expected}, found {found}");
    }

    #[test]
    fn small_batches_wait_for_memory() {
        // 0.2 + 2 · 0.4 GB in 10 ms for one; 0.2 + 3 · 0.4 GB in 14 ms for two.
        equal(work(None).decode(1, None, &machine()).bound, 100.0);
        equal(work(None).decode(2, None, &machine()).bound, 2.0 / 0.014);
    }

    #[test]
    fn large_batches_wait_for_the_cores() {
        // 0.22 G operations a token.
        equal(work(None).decode(1000, None, &machine()).bound, 1e12 / 0.22e9);
    }

    #[test]
    fn prompts_use_the_head_once() {
        // 0.2 G operations a token, and the head's 0.05 GB once; 1.75 GB in 17.5 ms allow more.
        equal(work(None).prefill(512, None, &machine()).bound, 512.0 / (512.0 * 0.2e-3 + 0.5e-3));
        equal(work(None).prefill(1024, None, &machine()).bound, 1024.0 / (1024.0 * 0.2e-3 + 0.5e-3));
    }

    #[test]
    fn prompts_read_all_weights_once_a_step() {
        let machine = Machine { matrix_rate: 1e15, ..machine() };
        // All experts in each step of 512 tokens, and of the single token of the last step two.
        equal(work(None).prefill(512, None, &machine).bound, 512.0 / 0.018);
        equal(work(None).prefill(1025, None, &machine).bound, 1025.0 / (2.0 * 0.0175 + 0.0095 + 0.0005));
        equal(Work::new(model(), 2048, None).prefill(1024, None, &machine).bound, 1024.0 / 0.018);
    }

    #[test]
    fn what_is_missing_comes_from_the_disk() {
        // Half of 0.8 GB from the disk in 0.1 s, the rest from memory in 6 ms.
        equal(work(Some(2)).decode(1, None, &machine()).bound, 1.0 / 0.106);
        assert_eq!(machine().disk_bandwidth(), Some(4e9));
        equal(work(Some(4)).decode(1, None, &machine()).bound, 100.0);
    }

    #[test]
    fn parts_that_were_timed_add_up() {
        // Layers 10 ms, head 1 ms, two experts of 20 ms.
        equal(work(None).decode(1, None, &machine()).predicted, 1.0 / 0.051);
        // Both are there, one is read in 200 ms while the other is computed, or both are read in 267: 1, 2 and 1 times in 4.
        let experts = 0.25 * 0.04 + 0.5 * (0.2 + 0.02) + 0.25 * (0.8 / 3.0 + 0.02);
        equal(work(Some(2)).decode(1, None, &machine()).predicted, 1.0 / (0.011 + experts));
        // Four experts with two rows each of four tokens (0.02 · 2 · 3.75 experts of 2.13 rows), all in memory.
        let (distinct, rows) = (3.75, 8.0 / 3.75);
        equal(work(None).decode(4, None, &machine()).predicted, 4.0 / (0.044 + distinct * 0.02 * rows));
    }

    #[test]
    fn a_prompt_reads_while_it_computes() {
        // 512 tokens: 5.12 s in the layers, 4 experts of 256 rows in 20.48 s, of which two are read meanwhile.
        let expected = 512.0 / (5.12 + 0.001 + 20.48);
        equal(work(Some(2)).prefill(512, None, &machine()).predicted, expected);
    }

    #[test]
    fn steps_that_were_seen_take_the_place_of_those_that_are_expected() {
        let seen = |distinct, hit_rate| Some(Seen { distinct, hit_rate });
        let (few, machine) = (work(Some(2)), machine());
        equal(few.decode(1, seen(2.0, 0.5), &machine).predicted, few.decode(1, None, &machine).predicted);
        equal(few.decode(1, seen(2.0, 1.0), &machine).predicted, work(None).decode(1, None, &machine).predicted);
        // One expert of eight tokens in place of four of two.
        equal(work(None).decode(8, seen(1.0, 1.0), &machine).bound, 8.0 / 0.006);
        equal(few.prefill(512, seen(4.0, 1.0), &machine).predicted, work(None).prefill(512, None, &machine).predicted);
        // A model that all lies in memory counts nothing.
        let nothing = Some(Seen { distinct: 0.0, hit_rate: 1.0 });
        equal(work(None).decode(8, nothing, &machine).predicted, work(None).decode(8, None, &machine).predicted);
    }

    #[test]
    fn a_step_reads_an_expert_once() {
        let layer = |experts, top_k, expert_bytes| MoeLayerInfo { experts, top_k, expert_bytes };
        let model = ModelInfo { moe_layers: vec![layer(4, 1, 100), layer(8, 4, 10)], ..model() };
        let bytes = |tokens| Work::new(model.clone(), 512, None).usage(tokens).bytes;
        assert_eq!(bytes(0), 0.0);
        assert_eq!(bytes(1), 100.0 + 40.0);
        // The second token's expert is the first's one time in four: 1.75 of 4, and 6 of 8.
        assert_eq!(bytes(2), 175.0 + 60.0);
        assert!((bytes(1000) - (400.0 + 80.0)).abs() < 1e-6);
    }

    #[test]
    fn what_is_used_most_is_what_is_held() {
        let skewed = work(Some(2)).with_profile(&[vec![30, 5, 30, 5]]);
        let even = work(Some(2)).usage(1);
        equal(even.hit_rate, 0.5);
        equal(even.distinct, 2.0);
        equal(skewed.usage(1).hit_rate, 6.0 / 7.0);
        // With many tokens everything is used, and the same two are held.
        assert!((skewed.usage(1000).hit_rate - 0.5).abs() < 1e-6);
        assert!(skewed.usage(3).distinct < work(Some(2)).usage(3).distinct);
        equal(work(None).with_profile(&[vec![30, 5, 30, 5]]).usage(1).hit_rate, 1.0);
    }

    #[test]
    fn a_profile_of_another_model_or_of_nothing_is_even_routing() {
        for profile in [&[vec![1, 2, 3]][..], &[], &[vec![0, 0, 0, 0]]] {
            assert_eq!(work(Some(1)).with_profile(profile).usage(1), work(Some(1)).usage(1));
        }
    }

    #[test]
    fn what_happens_to_some_of_many() {
        assert_eq!(binomial(2, 0.5).collect::<Vec<_>>(), [0.25, 0.5, 0.25]);
        assert_eq!(binomial(3, 0.0).collect::<Vec<_>>(), [1.0, 0.0, 0.0, 0.0]);
        assert_eq!(binomial(2, 1.0).collect::<Vec<_>>(), [0.0, 0.0, 1.0]);
        equal(binomial(64, 0.3).enumerate().map(|(count, likelihood)| count as f64 * likelihood).sum(), 19.2);
    }

    #[test]
    fn lines_go_through_their_points_and_on() {
        let points = || [(4.0, 8.0), (1.0, 5.0)].into_iter();
        for (x, y) in [(1.0, 5.0), (2.0, 6.0), (4.0, 8.0), (8.0, 16.0), (0.5, 2.5)] {
            equal(along(points(), x), y);
        }
        assert_eq!(along(std::iter::empty(), 3.0), 0.0);
    }
}
