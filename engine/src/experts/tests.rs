use std::{
    collections::HashSet,
    sync::{
        Arc, Condvar, Mutex, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use cadre_kernels::buffer::AllocError;
use candle_core::Device;
use proptest::prelude::*;

use super::*;
use crate::{
    Tensor,
    adapter::{FfnPlace, LoadedAdapter, RowAdapters},
    compute::Compute,
    model::{SequenceRows, StepBatch},
    nn::{Experts, Format, Module},
    ops::{Routes, grouped_ffn, stored_ffn},
    train::{
        parameters::{Parameter, Parameters},
        places::PlaceInfo,
        trained::{Adapter, Trained},
    },
};

const COUNT: usize = 7;
const THREADS: usize = 4;
const LAYOUT: FfnLayout = FfnLayout { format: Format::Q8_0, hidden: 64, intermediate: 48 };

/// A tier in memory that can fail, be slow, stall and count.
#[derive(Clone, Default)]
struct Memory(Arc<MemoryState>);

#[derive(Default)]
struct MemoryState {
    layers: Vec<Vec<u8>>,
    broken: Mutex<HashSet<ExpertId>>,
    panicking: Mutex<HashSet<ExpertId>>,
    delay: Mutex<Duration>,
    stall: Mutex<Stall>,
    changed: Condvar,
    fetches: AtomicUsize,
}

/// Experts whose reading doesn't come to an end, and how many wait for that.
#[derive(Default)]
struct Stall {
    experts: HashSet<ExpertId>,
    waiting: usize,
}

impl Memory {
    fn stall(&self, layer: u32, experts: impl IntoIterator<Item = u32>) {
        self.0.stall.lock().unwrap().experts.extend(experts.into_iter().map(|expert| ExpertId { layer, expert }));
    }

    fn wait_until_stalled(&self, reads: usize) {
        drop(self.0.changed.wait_while(self.0.stall.lock().unwrap(), |stall| stall.waiting < reads).unwrap());
    }

    fn go_on(&self) {
        self.0.stall.lock().unwrap().experts.clear();
        self.0.changed.notify_all();
    }
}

impl BlockingTier for Memory {
    fn name(&self) -> &str {
        "a test"
    }

    fn fetch(&self, id: ExpertId, out: &mut [u8]) -> Result<usize, FetchError> {
        std::thread::sleep(*self.0.delay.lock().unwrap());
        self.0.fetches.fetch_add(1, Ordering::Relaxed);
        let mut stall = self.0.stall.lock().unwrap();
        stall.waiting += 1;
        self.0.changed.notify_all();
        stall = self.0.changed.wait_while(stall, |stall| stall.experts.contains(&id)).unwrap();
        stall.waiting -= 1;
        drop(stall);
        // What was there before must not matter.
        out.fill(0xff);
        assert!(!self.0.panicking.lock().unwrap().contains(&id), "as asked for");
        if self.0.broken.lock().unwrap().contains(&id) {
            return Err(FetchError { id, tier: self.name().to_owned(), reason: "as asked for".to_owned() });
        }
        let size = expert_bytes(&LAYOUT);
        out[..size].copy_from_slice(&self.0.layers[id.layer as usize][id.expert as usize * size..][..size]);
        Ok(size)
    }
}

/// Two layers in memory, and the same in a store.
struct Rig {
    compute: Compute,
    resident: Vec<Experts>,
    tier: Memory,
    store: ExpertStore,
    stored: Vec<StoredExperts>,
}

impl Rig {
    fn new(slots: usize) -> Self {
        let compute = Compute::new(2);
        let resident: Vec<Experts> = (0..2_usize)
            .map(|layer| {
                Experts::from_rows(&compute, LAYOUT, COUNT, |expert, part, rows, out| {
                    for (index, value) in out.iter_mut().enumerate() {
                        let number = index + rows.start * 131 + expert * 977 + layer * 7919 + part as usize * 337;
                        *value = (number * 2_654_435_761 % 1009) as f32 / 1009.0 - 0.5;
                    }
                    Ok::<(), AllocError>(())
                })
                .unwrap()
            })
            .collect();
        let layers = resident.iter().map(|experts| experts.data().to_vec()).collect();
        let tier = Memory(Arc::new(MemoryState { layers, ..MemoryState::default() }));
        let slot_bytes = expert_bytes(&LAYOUT).next_multiple_of(4096);
        let threads = Threads::start(tier.clone(), THREADS).unwrap();
        let store = ExpertStore::new(Box::new(threads), slots, slot_bytes, &[COUNT, COUNT]).unwrap();
        let cell = Arc::new(OnceLock::new());
        assert!(cell.set(store.clone()).is_ok());
        let stored = (0..2).map(|layer| StoredExperts::new(layer, COUNT, LAYOUT, Arc::clone(&cell))).collect();
        Self { compute, resident, tier, store, stored }
    }

    /// Whether both give the same bits for these routes: two of the experts for each token.
    fn agree(&self, layer: usize, choices: &[(usize, usize)], lane: Lane) -> crate::Result<bool> {
        self.agree_with(None, layer, choices, lane)
    }

    /// The same, where every third row has an adapter if one is given.
    fn agree_with(
        &self,
        adapter: Option<Arc<LoadedAdapter>>,
        layer: usize,
        choices: &[(usize, usize)],
        lane: Lane,
    ) -> crate::Result<bool> {
        let sequence = |row| SequenceRows {
            rows: row..row + 1,
            context_len: 1,
            block_table: vec![0],
            adapter: adapter.clone().filter(|_| row % 3 == 1),
        };
        let batch = StepBatch { sequences: (0..choices.len()).map(sequence).collect(), ..StepBatch::default() };
        let rows = RowAdapters::of(&batch);
        let adapters = Some((&rows, FfnPlace::Routed(layer)));
        let mut routes = Routes { top_k: 2, experts: Vec::new(), weights: Vec::new() };
        for &(first, second) in choices {
            let (low, high) = if first == second { (first, (first + 1) % COUNT) } else { (first, second) };
            routes.experts.extend([low.min(high) as u32, low.max(high) as u32]);
            routes.weights.extend([0.3, 0.6]);
        }
        let x: Vec<f32> = (0..choices.len() * LAYOUT.hidden).map(|index| (index as f32 * 0.37).sin()).collect();
        let x = Tensor::from_vec(x, (choices.len(), LAYOUT.hidden), &Device::Cpu)?;
        let bits = |tensor: Tensor| -> crate::Result<Vec<u32>> {
            Ok(tensor.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f32::to_bits).collect())
        };
        let stored = bits(stored_ffn(&self.compute, &x, &self.stored[layer], &routes, adapters, lane)?)?;
        Ok(stored == bits(grouped_ffn(&self.compute, &x, &self.resident[layer], &routes, adapters)?)?)
    }
}

/// Of all experts of the first layer, and down only in the second.
fn adapter() -> Arc<LoadedAdapter> {
    let (mut trained, mut parameters, mut places) = (Trained::default(), Parameters::default(), Vec::new());
    for (layer, expert) in (0..2).flat_map(|layer| (0..COUNT).map(move |expert| (layer, expert))) {
        let FfnLayout { hidden, intermediate, .. } = LAYOUT;
        let [gate_up, down] = FfnPlace::Routed(layer).matrices(expert);
        for (place, inputs, rows) in [(gate_up, hidden, 2 * intermediate), (down, intermediate, hidden)] {
            let mut push = |shape: [usize; 2]| {
                let values = (0..shape[0] * shape[1]).map(|index| (index as f32 * 0.7).cos()).collect();
                parameters.push(Parameter { name: String::new(), shape: shape.to_vec(), values }).unwrap()
            };
            let (a, b) = (push([2, inputs]), push([rows, 2]));
            if layer == 0 || place == down {
                trained.of_mut(place).adapters.push(Adapter { rows: 0..rows, a, b, rank: 2, scale: 0.1 });
            }
            let modules = vec![Module { name: String::new(), rows }];
            places.push(PlaceInfo { place, inputs, format: Format::F32, modules });
        }
    }
    Arc::new(LoadedAdapter::new("test", &trained, parameters, &places).unwrap())
}

/// Every expert of a layer is used.
const ALL: [(usize, usize); 6] = [(0, 1), (2, 3), (4, 5), (6, 0), (3, 1), (5, 2)];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn what_is_resident_never_changes_a_bit(
        slots in 1..=2 * COUNT,
        steps in prop::collection::vec(
            (0..2_usize, prop::collection::vec((0..COUNT, 0..COUNT), 1..40), any::<bool>()), 1..12),
    ) {
        let rig = Rig::new(slots);
        for (layer, choices, scan) in steps {
            let lane = if scan { Lane::Scan } else { Lane::Decode };
            prop_assert!(rig.agree(layer, &choices, lane).unwrap());
            prop_assert!(rig.agree_with(Some(adapter()), layer, &choices, lane).unwrap());
        }
    }
}

#[test]
fn what_fits_is_fetched_once() {
    let rig = Rig::new(2 * COUNT);
    for _ in 0..5 {
        assert!(rig.agree(0, &ALL, Lane::Decode).unwrap() && rig.agree(1, &ALL, Lane::Decode).unwrap());
    }
    let counters = rig.store.counters();
    assert_eq!(rig.tier.0.fetches.load(Ordering::Relaxed), 2 * COUNT);
    assert_eq!((counters.misses(), counters.hits(), counters.evictions), (2 * COUNT as u64, 8 * COUNT as u64, 0));
    assert_eq!(counters.fetched_bytes, 2 * (COUNT * expert_bytes(&LAYOUT)) as u64);
    assert_eq!(counters.fetch_seconds.count(), 2 * COUNT as u64);
    // Five steps through both layers, each with all experts.
    assert_eq!((counters.active_per_step.count(), counters.active_per_step.mean()), (5, 2.0 * COUNT as f64));
    let layer = LayerCounters { hits: 4 * COUNT as u64, misses: COUNT as u64 };
    assert_eq!(counters.layers, [layer, layer]);
}

#[test]
fn an_expert_that_cannot_be_read_is_named_and_is_there_when_it_can() {
    for (slots, panics) in [1, 2, 5, 14].into_iter().flat_map(|slots| [(slots, false), (slots, true)]) {
        let rig = Rig::new(slots);
        let faults = if panics { &rig.tier.0.panicking } else { &rig.tier.0.broken };
        faults.lock().unwrap().insert(ExpertId { layer: 1, expert: 3 });
        let error = rig.agree(1, &ALL, Lane::Decode).unwrap_err().to_string();
        assert!(error.contains("expert 3 of layer 1") && error.contains("a test"), "{error}");
        // Those who don't need it don't notice.
        assert!(rig.agree(1, &[(0, 1), (2, 4)], Lane::Decode).unwrap());
        assert!(rig.agree(0, &ALL, Lane::Decode).unwrap());
        faults.lock().unwrap().clear();
        assert!(rig.agree(1, &ALL, Lane::Decode).unwrap());
    }
}

#[test]
fn waiting_for_the_disk_is_counted() {
    let rig = Rig::new(3);
    *rig.tier.0.delay.lock().unwrap() = Duration::from_millis(30);
    assert!(rig.agree(0, &ALL, Lane::Decode).unwrap());
    let counters = rig.store.counters();
    assert!(counters.stalled >= Duration::from_millis(30) && counters.fetch_seconds.mean() >= 0.03);
}

#[test]
fn what_is_wanted_next_is_read_while_nothing_else_is() {
    // A scan that uses all of layer 0 will want all of layer 1.
    let rig = Rig::new(2 * COUNT);
    assert!(rig.agree(0, &ALL, Lane::Scan).unwrap());
    assert!(rig.agree(1, &ALL, Lane::Scan).unwrap());
    let counters = rig.store.counters();
    assert!(counters.ahead_used > 0, "{counters:?}");
    assert_eq!((counters.misses(), counters.ahead_wasted_bytes), (2 * COUNT as u64, 0));
    assert_eq!(rig.tier.0.fetches.load(Ordering::Relaxed), 2 * COUNT, "once each");
}

#[test]
fn what_the_next_router_would_choose_is_read_ahead() {
    let rig = Rig::new(2 * COUNT);
    let store = rig.store.clone().predicting(true);
    store.predict(1, vec![5, 2]);
    assert!(rig.agree(0, &[(0, 1)], Lane::Decode).unwrap());
    assert!(rig.agree(1, &[(3, 5)], Lane::Decode).unwrap());
    let counters = rig.store.counters();
    assert_eq!((counters.misses(), counters.ahead_used), (4, 1), "{counters:?}");
    // It was for that layer alone.
    assert!(rig.agree(0, &[(0, 1)], Lane::Decode).unwrap());
    assert!(rig.agree(1, &[(3, 6)], Lane::Decode).unwrap());
    assert_eq!((rig.store.counters().misses(), rig.store.counters().ahead_used), (5, 1));
}

#[test]
fn what_an_earlier_run_used_is_there_at_the_start() {
    let rig = Rig::new(4);
    let mut profile = vec![vec![0; COUNT]; 2];
    (profile[0][2], profile[0][5], profile[1][1], profile[1][3], profile[1][6]) = (900, 60_000, 40_000, 20_000, 1000);
    rig.store.seed(&profile).unwrap();
    while rig.store.counters().fetch_seconds.count() < 4 {
        std::thread::yield_now();
    }
    assert!(rig.agree(0, &[(2, 5)], Lane::Decode).unwrap());
    let counters = rig.store.counters();
    assert_eq!((counters.hits(), counters.misses()), (1, 1), "2 of layer 0 is used least: {counters:?}");
    assert!(rig.agree(1, &[(1, 3)], Lane::Decode).unwrap());
    assert_eq!(rig.store.counters().hits(), 3);
}

#[test]
fn nothing_waits_for_what_is_there_before_it_is_wanted() {
    let rig = Rig::new(2 * COUNT);
    rig.tier.stall(1, [0, 1]);
    let mut profile = vec![vec![0; COUNT]; 2];
    (profile[1][0], profile[1][1]) = (60_000, 50_000);
    rig.store.seed(&profile).unwrap();
    rig.tier.wait_until_stalled(2);
    assert!(rig.agree(0, &ALL, Lane::Decode).unwrap());
    rig.tier.go_on();
    assert!(rig.agree(1, &ALL, Lane::Decode).unwrap());
    assert_eq!(rig.tier.0.fetches.load(Ordering::Relaxed), 2 * COUNT, "once each");
}

#[test]
fn reading_ahead_in_vain_fails_nobody() {
    let rig = Rig::new(2 * COUNT);
    rig.tier.0.broken.lock().unwrap().extend((0..COUNT as u32).map(|expert| ExpertId { layer: 1, expert }));
    assert!(rig.agree(0, &ALL, Lane::Scan).unwrap());
    assert!(rig.agree(1, &ALL, Lane::Scan).is_err());
    rig.tier.0.broken.lock().unwrap().clear();
    assert!(rig.agree(1, &ALL, Lane::Scan).unwrap());
}

#[test]
fn a_stalled_read_holds_up_only_those_who_need_it() {
    let rig = Rig::new(2 * COUNT);
    rig.tier.stall(0, [0]);
    std::thread::scope(|scope| {
        let stalled = scope.spawn(|| rig.agree(0, &[(0, 1), (2, 3)], Lane::Decode).unwrap());
        rig.tier.wait_until_stalled(1);
        assert!(rig.agree(1, &ALL, Lane::Decode).unwrap());
        assert!(rig.agree(0, &[(1, 2), (3, 4), (5, 6)], Lane::Decode).unwrap());
        assert!(!stalled.is_finished());
        rig.tier.go_on();
        assert!(stalled.join().unwrap());
    });
}

#[test]
fn all_goes_on_after_a_stall_of_the_whole_disk() {
    let rig = Rig::new(COUNT);
    rig.tier.stall(0, 0..COUNT as u32);
    rig.tier.stall(1, 0..COUNT as u32);
    std::thread::scope(|scope| {
        let steps = [0, 1].map(|layer| {
            let rig = &rig;
            scope.spawn(move || rig.agree(layer, &[(0, 1), (2, 3)], Lane::Decode).unwrap())
        });
        rig.tier.wait_until_stalled(THREADS);
        rig.tier.go_on();
        assert!(steps.into_iter().all(|step| step.join().unwrap()));
    });
    assert!(rig.agree(0, &ALL, Lane::Decode).unwrap() && rig.agree(1, &ALL, Lane::Decode).unwrap());
}

#[test]
fn many_visits_at_a_time_end_with_the_right_bits() {
    for slots in [1, 2, 3, 5, 8, 12] {
        let rig = Rig::new(slots);
        let store = rig.store.clone().predicting(true);
        std::thread::scope(|scope| {
            for thread in 0..4_usize {
                let (rig, store) = (&rig, &store);
                scope.spawn(move || {
                    for step in 0..40_usize {
                        let number = (step * 31 + thread * 17) % 53;
                        let choices = [(number % 7, (number + 2) % 7), ((number + 3) % 7, (number + 5) % 7)];
                        store.predict(1 - number % 2, vec![number % 7, (number + 1) % 7]);
                        let lane = if number % 5 == 0 { Lane::Scan } else { Lane::Decode };
                        let choices = if number % 3 == 0 { &ALL[..] } else { &choices };
                        assert!(rig.agree(number % 2, choices, lane).unwrap());
                    }
                });
            }
        });
    }
}

#[test]
fn who_misses_the_same_expert_shares_one_read() {
    let rig = Rig::new(3);
    rig.tier.stall(0, [4]);
    let visits: Vec<_> = (0..3).map(|_| rig.store.visit(0, &[4], Lane::Decode)).collect();
    std::thread::scope(|scope| {
        let landed: Vec<_> = visits.into_iter().map(|mut visit| scope.spawn(move || visit.landed().unwrap())).collect();
        rig.tier.wait_until_stalled(1);
        rig.tier.go_on();
        assert!(landed.into_iter().all(|landed| landed.join().unwrap() == [0]));
    });
    assert_eq!(rig.tier.0.fetches.load(Ordering::Relaxed), 1);
}

/// A tier that keeps what it is given for a test to finish.
#[derive(Clone, Default)]
struct Kept(Arc<Mutex<Vec<Fetch>>>);

impl Tier for Kept {
    fn name(&self) -> &str {
        "a test"
    }

    fn depth(&self) -> usize {
        2
    }

    fn fetch(&self, fetch: Fetch) {
        self.0.lock().unwrap().push(fetch);
    }
}

#[test]
fn a_tier_is_given_as_much_as_it_works_on_in_the_order_of_the_visit() {
    let tier = Kept::default();
    let store = ExpertStore::new(Box::new(tier.clone()), 8, 4096, &[COUNT]).unwrap();
    let mut visit = store.visit(0, &[0, 1, 3, 5, 6], Lane::Decode);
    let mut order = Vec::new();
    loop {
        let mut given = std::mem::take(&mut *tier.0.lock().unwrap());
        assert!(given.len() <= 2, "{}", given.len());
        // The newest comes first.
        let Some(newest) = given.pop() else { break };
        order.push(newest.id().expert);
        tier.0.lock().unwrap().append(&mut given);
        newest.finish(Ok(1));
    }
    assert_eq!(order, [1, 3, 5, 6, 0]);
    assert_eq!(visit.landed().unwrap(), [0, 1, 2, 3, 4]);
}

/// A tier that does at once what it does: it gives up every third expert, panics for the next, and has the next.
struct Rude;

impl Tier for Rude {
    fn name(&self) -> &str {
        "a test"
    }

    fn depth(&self) -> usize {
        1
    }

    fn fetch(&self, mut fetch: Fetch) {
        match fetch.id().expert % 3 {
            0 => drop(fetch),
            1 => panic!("as asked for"),
            _ => {
                fetch.buffer().fill(7);
                fetch.finish(Ok(4096));
            }
        }
    }
}

#[test]
fn nobody_waits_for_a_fetch_that_was_dropped() {
    let store = ExpertStore::new(Box::new(Rude), 6, 4096, &[6]).unwrap();
    let wanted: Vec<_> = (0..6).map(|expert| [expert]).collect();
    let mut visits: Vec<_> = wanted.iter().map(|wanted| store.visit(0, wanted, Lane::Decode)).collect();
    for (expert, visit) in visits.iter_mut().enumerate() {
        match visit.landed() {
            Ok(landed) => assert!(expert % 3 == 2 && landed == [0] && visit.bytes(0)[4095] == 7, "{expert}"),
            Err(error) => assert!(expert % 3 < 2 && error.tier == "a test" && error.id.expert as usize == expert),
        }
    }
    drop(visits);
    // What failed is asked for again.
    assert_eq!(store.counters().misses(), 6);
    assert!(store.visit(0, &[0], Lane::Decode).landed().is_err());
    assert_eq!(store.counters().misses(), 7);
}

#[test]
fn a_visit_holds_what_it_took_until_it_releases_it() {
    let rig = Rig::new(4);
    let mut first = rig.store.visit(0, &[0, 1, 2], Lane::Decode);
    while !first.landed().unwrap().is_empty() {}
    let before = [0, 1, 2].map(|index| first.bytes(index).to_vec());
    {
        let mut second = rig.store.visit(1, &[0, 1, 2], Lane::Decode);
        for index in 0..3 {
            assert_eq!(second.landed().unwrap(), [index], "one slot is left, and each waits for the one before");
            second.release(index..index + 1);
        }
        assert!(second.landed().unwrap().is_empty());
    }
    assert_eq!([0, 1, 2].map(|index| first.bytes(index).to_vec()), before);
}

#[test]
fn a_store_that_was_not_opened_is_an_error() {
    let rig = Rig::new(1);
    let unopened = StoredExperts::new(0, COUNT, LAYOUT, Arc::default());
    let x = Tensor::zeros((1, LAYOUT.hidden), candle_core::DType::F32, &Device::Cpu).unwrap();
    let result = stored_ffn(&rig.compute, &x, &unopened, &Routes::dense(1), None, Lane::Decode);
    assert!(result.unwrap_err().to_string().contains("not opened"));
}
