//! What `/metrics` shows: vLLM's names where the meaning is the same, so that its dashboards and routers work
//! unchanged, and cadre's own beside them. No label ever takes a value from a request, but for
//! the names of adapters, which only requests to load one can give.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use cadre_engine::{
    experts::{self, Bucket, StoreCounters},
    kv::blocks::BLOCK_SIZE,
    request::Request,
    runtime::StepReport,
};
use metrics::{
    Counter, Gauge, Histogram, SharedString, counter, describe_counter, describe_gauge, describe_histogram, gauge,
    histogram,
};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

/// Buckets in seconds, from a token's to a long answer's time.
const SECONDS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 20.0,
    40.0, 80.0, 160.0, 640.0,
];
/// Buckets for numbers of tokens.
const TOKENS: &[f64] = &[
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10_000.0, 20_000.0, 50_000.0,
    100_000.0,
];
/// Buckets for small numbers.
const COUNTS: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0];

const BUCKETS: &[(&str, &[f64])] = &[
    ("vllm:time_to_first_token_seconds", SECONDS),
    ("vllm:inter_token_latency_seconds", SECONDS),
    ("vllm:request_time_per_output_token_seconds", SECONDS),
    ("vllm:e2e_request_latency_seconds", SECONDS),
    ("vllm:request_queue_time_seconds", SECONDS),
    ("vllm:request_prefill_time_seconds", SECONDS),
    ("vllm:request_decode_time_seconds", SECONDS),
    ("vllm:request_inference_time_seconds", SECONDS),
    ("cadre_step_seconds", SECONDS),
    ("cadre_finetune_step_seconds", SECONDS),
    ("vllm:iteration_tokens_total", TOKENS),
    ("vllm:request_prompt_tokens", TOKENS),
    ("vllm:request_generation_tokens", TOKENS),
    ("vllm:request_params_max_tokens", TOKENS),
    ("vllm:request_params_n", COUNTS),
    // The store counts in these ranges, so they are its own.
    ("cadre_expert_read_seconds", &experts::FETCH_SECONDS),
    ("cadre_experts_active_per_step", &experts::ACTIVE_PER_STEP),
];

/// The exporter, with the buckets of every histogram.
///
/// # Errors
/// Never, as long as no bucket list is empty.
pub fn exporter() -> anyhow::Result<PrometheusBuilder> {
    BUCKETS.iter().try_fold(PrometheusBuilder::new(), |builder, (name, buckets)| {
        let matcher = Matcher::Full((*name).to_owned());
        builder.set_buckets_for_metric(matcher, buckets).context("a histogram has no buckets")
    })
}

/// Installs the exporter as this process's recorder.
///
/// # Errors
/// When there is one already.
pub fn install() -> anyhow::Result<PrometheusHandle> {
    let handle = exporter()?.install_recorder().context("metrics can't be recorded")?;
    describe();
    Ok(handle)
}

/// Says what cadre's own metrics mean; vLLM's are documented there.
fn describe() {
    describe_counter!("cadre_http_requests_total", "HTTP requests answered, by route, method and status");
    describe_counter!("cadre_requests_cancelled_total", "Requests whose client left, by how far they had come");
    describe_counter!("cadre_requests_failed_total", "Requests that the engine gave up");
    describe_counter!("cadre_ignored_parameters_total", "Fields of requests that nobody knows");
    describe_histogram!("cadre_step_seconds", "Time that one step of the engine takes");
    describe_gauge!("cadre_memory_bytes", "Memory by what it is for");
    describe_counter!("cadre_expert_hits_total", "Uses of experts that were in memory, once a step and layer");
    describe_counter!("cadre_expert_misses_total", "Uses of experts that had to be read");
    describe_counter!("cadre_expert_evictions_total", "Experts that made room for others");
    describe_counter!("cadre_expert_read_bytes_total", "Bytes of experts read");
    describe_counter!(
        "cadre_expert_ahead_used_total",
        "Misses whose expert was read, or being read, before it was wanted"
    );
    describe_counter!("cadre_expert_ahead_wasted_bytes_total", "Bytes of experts that were read ahead for nothing");
    describe_gauge!("cadre_expert_stall_seconds", "Time that computing has waited for experts so far");
    describe_gauge!("cadre_expert_layer_hit_rate", "Uses of a layer's experts that were in memory, as a part of all");
    describe_gauge!("cadre_finetune_jobs", "Fine-tuning jobs by status");
    describe_gauge!("cadre_batches", "Batches of /v1/batches by status");
    describe_counter!(
        "cadre_batch_lines_total",
        "Lines of such batches that were answered, by whether they have failed"
    );
    describe_gauge!("cadre_finetune_loss", "Training loss of the latest step of a fine-tuning job");
    describe_counter!("cadre_finetune_tokens_total", "Tokens that fine-tuning jobs have trained on");
    describe_histogram!("cadre_finetune_step_seconds", "Time that a step of a fine-tuning job takes");
    describe_histogram!("cadre_expert_read_seconds", "Time that reading one expert takes");
    describe_histogram!("cadre_experts_active_per_step", "Different experts that a step uses, all layers together");
}

/// How many batches have a status.
pub fn batches(status: &'static str, count: i64) {
    gauge!("cadre_batches", "status" => status).set(count as f64);
}

/// A line of a batch was answered.
pub fn batch_line(has_failed: bool) {
    counter!("cadre_batch_lines_total", "status" => if has_failed { "failed" } else { "completed" }).increment(1);
}

/// How many fine-tuning jobs have a status.
pub fn finetune_jobs(status: &'static str, count: i64) {
    gauge!("cadre_finetune_jobs", "status" => status).set(count as f64);
}

/// A fine-tuning job has made a step.
pub fn finetune_step(loss: f64, tokens: u64, seconds: f64) {
    gauge!("cadre_finetune_loss").set(loss);
    counter!("cadre_finetune_tokens_total").increment(tokens);
    histogram!("cadre_finetune_step_seconds").record(seconds);
}

/// The tier that experts are read from.
const TIER: &str = "disk";

/// The instruments of experts that don't fit the memory.
pub struct ExpertMeters {
    hits: Counter,
    misses: Counter,
    evictions: Counter,
    ahead_used: Counter,
    ahead_wasted_bytes: Counter,
    read_bytes: Counter,
    stall_seconds: Gauge,
    layer_hit_rates: Vec<Gauge>,
    read_seconds: Histogram,
    active_per_step: Histogram,
    shown: StoreCounters,
}

impl ExpertMeters {
    /// Those of the experts on disk, in so many layers.
    pub fn new(layers: usize) -> Self {
        let layer_hit_rate =
            |layer: usize| gauge!("cadre_expert_layer_hit_rate", "tier" => TIER, "layer" => layer.to_string());
        Self {
            hits: counter!("cadre_expert_hits_total", "tier" => TIER),
            misses: counter!("cadre_expert_misses_total", "tier" => TIER),
            evictions: counter!("cadre_expert_evictions_total", "tier" => TIER),
            ahead_used: counter!("cadre_expert_ahead_used_total", "tier" => TIER),
            ahead_wasted_bytes: counter!("cadre_expert_ahead_wasted_bytes_total", "tier" => TIER),
            read_bytes: counter!("cadre_expert_read_bytes_total", "tier" => TIER),
            stall_seconds: gauge!("cadre_expert_stall_seconds", "tier" => TIER),
            layer_hit_rates: (0..layers).map(layer_hit_rate).collect(),
            read_seconds: histogram!("cadre_expert_read_seconds", "tier" => TIER),
            active_per_step: histogram!("cadre_experts_active_per_step", "tier" => TIER),
            shown: StoreCounters::default(),
        }
    }

    /// Shows what the store has done so far.
    pub fn show(&mut self, counters: StoreCounters) {
        self.hits.absolute(counters.hits());
        self.misses.absolute(counters.misses());
        self.evictions.absolute(counters.evictions);
        self.ahead_used.absolute(counters.ahead_used);
        self.ahead_wasted_bytes.absolute(counters.ahead_wasted_bytes);
        self.read_bytes.absolute(counters.fetched_bytes);
        self.stall_seconds.set(counters.stalled.as_secs_f64());
        for (gauge, rate) in self.layer_hit_rates.iter().zip(counters.layer_hit_rates()) {
            gauge.set(rate);
        }
        record(&self.read_seconds, &counters.fetch_seconds.since(&self.shown.fetch_seconds));
        record(&self.active_per_step, &counters.active_per_step.since(&self.shown.active_per_step));
        self.shown = counters;
    }
}

/// Which adapters requests use, as vLLM tells it: in labels, with the time of the last change as the value, so that
/// routers take the newest.
pub struct AdapterMeters {
    max: SharedString,
    shown: [String; 2],
}

impl AdapterMeters {
    /// Nobody uses one yet; at most `max` may be used in one step.
    pub fn new(max: usize) -> Self {
        let meters = Self { max: max.to_string().into(), shown: Default::default() };
        meters.set();
        meters
    }

    /// Shows the names of adapters that running and waiting sequences have.
    pub fn show(&mut self, running: &[String], waiting: &[String]) {
        let now = [running.join(","), waiting.join(",")];
        if now != self.shown {
            self.shown = now;
            self.set();
        }
    }

    fn set(&self) {
        let [running, waiting] = self.shown.clone();
        let labels: [(&str, SharedString); 3] = [
            ("max_lora", self.max.clone()),
            ("running_lora_adapters", running.into()),
            ("waiting_lora_adapters", waiting.into()),
        ];
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        gauge!("vllm:lora_requests_info", &labels).set(now.as_secs_f64());
    }
}

/// Adds what a histogram of the same ranges has counted. The mean of a range's values lies in it: so counts and sum are right.
fn record(histogram: &Histogram, counted: &experts::Histogram) {
    for Bucket { count, sum } in counted.buckets().iter().filter(|bucket| bucket.count > 0) {
        let count = usize::try_from(*count).unwrap_or(usize::MAX);
        histogram.record_many(sum / float(count), count);
    }
}

/// One model's instruments.
pub struct Meters {
    running: Gauge,
    waiting: Gauge,
    kv_usage: Gauge,
    prompt_tokens: Counter,
    generation_tokens: Counter,
    prefix_queries: Counter,
    prefix_hits: Counter,
    cached_tokens: Counter,
    preemptions: Counter,
    iteration_tokens: Histogram,
    step_seconds: Histogram,
    cancelled: [Counter; 3],
    failed: Counter,
    finished: [(&'static str, Counter); 2],
    per_request: PerRequest,
}

struct PerRequest {
    n: Histogram,
    max_tokens: Histogram,
    prompt_tokens: Histogram,
    generation_tokens: Histogram,
    first_token: Histogram,
    inter_token: Histogram,
    per_output_token: Histogram,
    end_to_end: Histogram,
    queue: Histogram,
    prefill: Histogram,
    decode: Histogram,
    inference: Histogram,
}

/// vLLM's two labels.
fn labels(model: &str) -> [(&'static str, SharedString); 2] {
    [("model_name", SharedString::from(model.to_owned())), ("engine", SharedString::from("0"))]
}

fn finished_counter(model: &str, reason: &'static str) -> Counter {
    let [name, engine] = labels(model);
    counter!("vllm:request_success_total", &[name, engine, ("finished_reason", reason.into())])
}

fn cancelled_counter(phase: &'static str) -> Counter {
    counter!("cadre_requests_cancelled_total", "phase" => phase)
}

impl Meters {
    /// The instruments of the model that is served as `model`.
    pub fn new(model: &str) -> Self {
        let labels = &labels(model);
        Self {
            running: gauge!("vllm:num_requests_running", labels),
            waiting: gauge!("vllm:num_requests_waiting", labels),
            kv_usage: gauge!("vllm:kv_cache_usage_perc", labels),
            prompt_tokens: counter!("vllm:prompt_tokens_total", labels),
            generation_tokens: counter!("vllm:generation_tokens_total", labels),
            prefix_queries: counter!("vllm:prefix_cache_queries_total", labels),
            prefix_hits: counter!("vllm:prefix_cache_hits_total", labels),
            cached_tokens: counter!("vllm:prompt_tokens_cached_total", labels),
            preemptions: counter!("vllm:num_preemptions_total", labels),
            iteration_tokens: histogram!("vllm:iteration_tokens_total", labels),
            step_seconds: histogram!("cadre_step_seconds"),
            cancelled: ["queue", "prefill", "decode"].map(cancelled_counter),
            failed: counter!("cadre_requests_failed_total"),
            finished: ["stop", "length"].map(|reason| (reason, finished_counter(model, reason))),
            per_request: PerRequest {
                n: histogram!("vllm:request_params_n", labels),
                max_tokens: histogram!("vllm:request_params_max_tokens", labels),
                prompt_tokens: histogram!("vllm:request_prompt_tokens", labels),
                generation_tokens: histogram!("vllm:request_generation_tokens", labels),
                first_token: histogram!("vllm:time_to_first_token_seconds", labels),
                inter_token: histogram!("vllm:inter_token_latency_seconds", labels),
                per_output_token: histogram!("vllm:request_time_per_output_token_seconds", labels),
                end_to_end: histogram!("vllm:e2e_request_latency_seconds", labels),
                queue: histogram!("vllm:request_queue_time_seconds", labels),
                prefill: histogram!("vllm:request_prefill_time_seconds", labels),
                decode: histogram!("vllm:request_decode_time_seconds", labels),
                inference: histogram!("vllm:request_inference_time_seconds", labels),
            },
        }
    }

    /// Takes over what one step did.
    pub fn step(&self, report: &StepReport) {
        self.running.set(float(report.running));
        self.waiting.set(float(report.waiting));
        self.kv_usage.set(float(report.kv_blocks_used) / float(report.kv_blocks_total.max(1)));
        self.prompt_tokens.increment(report.prompt_tokens as u64);
        self.generation_tokens.increment(report.generated_tokens as u64);
        self.prefix_queries.increment(report.prefix_queries);
        self.prefix_hits.increment(report.prefix_hits);
        self.preemptions.increment(report.preemptions as u64);
        self.failed.increment(report.failed as u64);
        let cancelled = &report.cancelled;
        for (counter, count) in self.cancelled.iter().zip([cancelled.queue, cancelled.prefill, cancelled.decode]) {
            counter.increment(count as u64);
        }
        if report.scheduled_tokens > 0 {
            self.iteration_tokens.record(float(report.scheduled_tokens));
            self.step_seconds.record(report.step_seconds);
        }
    }

    /// A request of `choices` goes to the engine now.
    ///
    /// The engine reports at the end of a step, which may take seconds; its next report sets the gauge anew. Once the
    /// request is with the engine, the last report may have come already: then nothing would take the request off again.
    pub fn submitting(&self, choices: u32) {
        self.waiting.increment(choices);
    }

    /// The engine didn't take a request of `choices`.
    pub fn refused(&self, choices: u32) {
        self.waiting.decrement(choices);
    }

    /// The engine took a request.
    pub fn submitted(&self, request: &Request) {
        self.per_request.n.record(request.n);
        self.per_request.max_tokens.record(request.stop.max_tokens);
        self.per_request.prompt_tokens.record(float(request.prompt.len()));
    }

    /// A choice ended.
    pub fn choice_finished(&self, reason: &str, generated: usize) {
        self.per_request.generation_tokens.record(float(generated));
        if let Some((_, counter)) = self.finished.iter().find(|(known, _)| *known == reason) {
            counter.increment(1);
        }
    }
}

/// Tells what never changes while a model is served.
pub fn describe_model(model: &str, kv_blocks: usize, prefix_caching: bool, bytes: &[(&'static str, u64)]) {
    let [name, engine] = labels(model);
    let config = [
        name,
        engine,
        ("block_size", BLOCK_SIZE.to_string().into()),
        ("num_gpu_blocks", kv_blocks.to_string().into()),
        ("enable_prefix_caching", prefix_caching.to_string().into()),
    ];
    gauge!("vllm:cache_config_info", &config).set(1.0);
    bytes.iter().for_each(|(pool, bytes)| memory(pool, *bytes));
}

/// Tells how much memory is used for something.
pub fn memory(pool: &'static str, bytes: u64) {
    #[expect(clippy::cast_precision_loss, reason = "a gauge is a float; sizes stay far below 2^53")]
    gauge!("cadre_memory_bytes", "pool" => pool).set(bytes as f64);
}

/// A request was answered.
pub fn http_request(route: &'static str, method: &'static str, status: u16) {
    counter!("cadre_http_requests_total", "route" => route, "method" => method, "status" => status.to_string())
        .increment(1);
}

/// A request had fields that nobody knows.
pub fn ignored_parameters(count: usize) {
    counter!("cadre_ignored_parameters_total").increment(count as u64);
}

/// The moments of one request.
#[derive(Debug)]
pub struct Timeline {
    submitted: Instant,
    started: Option<Instant>,
    first_token: Option<Instant>,
}

impl Timeline {
    /// Of a request that was submitted at `submitted`.
    pub fn new(submitted: Instant) -> Self {
        Self { submitted, started: None, first_token: None }
    }

    /// It left the queue, with `cached_tokens` of its prompt in the prefix cache.
    pub fn started(&mut self, at: Instant, cached_tokens: u32, meters: &Meters) {
        meters.cached_tokens.increment(cached_tokens.into());
        self.started = Some(at);
        meters.per_request.queue.record(at - self.submitted);
    }

    /// One of its choices grew; `before` is when that choice last did.
    pub fn token(&mut self, at: Instant, before: Option<Instant>, meters: &Meters) {
        if self.first_token.is_none() {
            self.first_token = Some(at);
            meters.per_request.first_token.record(at - self.submitted);
            meters.per_request.prefill.record(at - self.started.unwrap_or(self.submitted));
        }
        if let Some(before) = before {
            meters.per_request.inter_token.record(at - before);
        }
    }

    /// Its last choice ended, with `generated` tokens.
    pub fn finished(&self, at: Instant, generated: usize, meters: &Meters) {
        let per_request = &meters.per_request;
        per_request.end_to_end.record(at - self.submitted);
        per_request.inference.record(at - self.started.unwrap_or(self.submitted));
        let decode = self.first_token.map_or(Duration::ZERO, |first| at - first);
        per_request.decode.record(decode);
        if generated > 1 {
            per_request.per_output_token.record(decode.as_secs_f64() / float(generated - 1));
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "metrics are floats; counts stay far below 2^53")]
fn float(count: usize) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use cadre_engine::{experts::LayerCounters, runtime::Cancelled};

    use super::*;

    /// What is rendered after `record` ran.
    fn rendered(record: impl FnOnce()) -> String {
        let recorder = exporter().unwrap().build_recorder();
        let handle = recorder.handle();
        metrics::with_local_recorder(&recorder, record);
        handle.render()
    }

    #[test]
    fn vllms_names_survive_the_exporter() {
        let text = rendered(|| {
            let meters = Meters::new("m");
            meters.step(&StepReport { running: 3, kv_blocks_used: 1, kv_blocks_total: 4, ..StepReport::default() });
            describe_model("m", 4, true, &[("kv", 7)]);
        });
        for line in [
            r#"vllm:num_requests_running{model_name="m",engine="0"} 3"#,
            r#"vllm:kv_cache_usage_perc{model_name="m",engine="0"} 0.25"#,
            r#"cadre_memory_bytes{pool="kv"} 7"#,
            r#"block_size="16",num_gpu_blocks="4""#,
        ] {
            assert!(text.contains(line), "{line} is missing in\n{text}");
        }
    }

    /// A set that comes again is the newest again.
    #[test]
    fn the_adapters_in_use_are_told_with_the_time() {
        let text = rendered(|| {
            let mut meters = AdapterMeters::new(64);
            let names = ["one".to_owned(), "two".to_owned()];
            meters.show(&names, &[]);
            meters.show(&[], &names[..1]);
            meters.show(&names, &[]);
        });
        let value = |running: &str, waiting: &str| {
            let labels =
                format!(r#"{{max_lora="64",running_lora_adapters="{running}",waiting_lora_adapters="{waiting}"}} "#);
            let (_, rest) = text.split_once(&format!("vllm:lora_requests_info{labels}")).expect(&text);
            rest.lines().next().unwrap().parse::<f64>().unwrap()
        };
        assert!(value("one,two", "") > value("", "one") && value("", "one") > value("", ""), "{text}");
    }

    #[test]
    fn steps_add_up() {
        let report = StepReport {
            generated_tokens: 2,
            cancelled: Cancelled { decode: 1, ..Cancelled::default() },
            ..StepReport::default()
        };
        let text = rendered(|| {
            let meters = Meters::new("m");
            meters.step(&report);
            meters.step(&report);
        });
        assert!(text.contains(r#"vllm:generation_tokens_total{model_name="m",engine="0"} 4"#), "{text}");
        assert!(text.contains(r#"cadre_requests_cancelled_total{phase="decode"} 2"#), "{text}");
        assert!(text.contains(r#"cadre_requests_cancelled_total{phase="queue"} 0"#), "{text}");
    }

    #[test]
    fn what_the_expert_store_counts_is_shown_once() {
        let text = rendered(|| {
            let mut meters = ExpertMeters::new(2);
            let mut counters = StoreCounters {
                layers: vec![LayerCounters { hits: 3, misses: 1 }, LayerCounters { hits: 1, misses: 3 }],
                ..StoreCounters::default()
            };
            for seconds in [0.0018, 0.0014, 3.0] {
                counters.fetch_seconds.record(seconds, &experts::FETCH_SECONDS);
                meters.show(counters.clone());
                meters.show(counters.clone());
            }
        });
        for line in [
            r#"cadre_expert_hits_total{tier="disk"} 4"#,
            r#"cadre_expert_layer_hit_rate{tier="disk",layer="0"} 0.75"#,
            r#"cadre_expert_layer_hit_rate{tier="disk",layer="1"} 0.25"#,
            r#"cadre_expert_read_seconds_bucket{tier="disk",le="0.001"} 0"#,
            r#"cadre_expert_read_seconds_bucket{tier="disk",le="0.002"} 2"#,
            r#"cadre_expert_read_seconds_count{tier="disk"} 3"#,
        ] {
            assert!(text.contains(line), "{line} is missing in\n{text}");
        }
    }

    #[test]
    fn every_histogram_has_buckets() {
        let start = Instant::now();
        let text = rendered(|| {
            let meters = Meters::new("m");
            let mut timeline = Timeline::new(start);
            timeline.started(start + Duration::from_millis(1), 5, &meters);
            timeline.token(start + Duration::from_millis(2), None, &meters);
            timeline.token(start + Duration::from_millis(3), Some(start), &meters);
            timeline.finished(start + Duration::from_millis(4), 2, &meters);
            meters.choice_finished("stop", 2);
            meters.step(&StepReport { scheduled_tokens: 2, ..StepReport::default() });
        });
        assert!(!text.contains("summary"), "{text}");
        assert!(text.contains("vllm:time_to_first_token_seconds_bucket"), "{text}");
        assert!(text.contains(r#"vllm:prompt_tokens_cached_total{model_name="m",engine="0"} 5"#), "{text}");
        assert!(text.contains(r#"finished_reason="stop"} 1"#), "{text}");
    }
}
