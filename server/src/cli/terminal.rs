//! What subcommands in a terminal share: flags for sampling, an answer that is written as it comes, Ctrl-C.

use std::{
    io::{self, Write},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result};
use cadre_engine::{experts::ExpertStore, request::Request, runtime::Runtime};
use clap::Args;
use serde_json::{Map, Value};
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    adapters::AdapterSource,
    engine::{self, Engine, EngineOptions, Served},
    generation::{Generation, OutputOptions, Update},
    http::{
        chat,
        error::ApiError,
        fields::Fields,
        params::shared::{MaxTokens, Shared},
    },
    profile::KeptProfile,
};

/// The flag for an adapter.
#[derive(Debug, Clone, Args)]
pub struct AdapterArgs {
    /// A LoRA adapter to add to the model: the folder, as PEFT saves it
    #[arg(long, value_name = "DIR", help_heading = "Engine")]
    adapter: Option<PathBuf>,
}

/// How tokens are chosen. The names, ranges and defaults are those of the HTTP API.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingArgs {
    /// The most tokens to generate [default: what the context leaves]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: Option<u32>,

    /// 0 always takes the likeliest token; more is more varied [default: the checkpoint's]
    #[arg(long, value_name = "0..2", value_parser = finite)]
    temperature: Option<f64>,

    /// Choose among the likeliest tokens that together have this probability [default: the checkpoint's]
    #[arg(long, value_name = "0..1", value_parser = finite)]
    top_p: Option<f64>,

    /// Choose among this many likeliest tokens; 0 is off [default: the checkpoint's]
    #[arg(long, value_name = "N")]
    top_k: Option<u32>,

    /// Drop tokens less likely than this share of the likeliest one's [default: the checkpoint's]
    #[arg(long, value_name = "0..1", value_parser = finite)]
    min_p: Option<f64>,

    /// The same seed gives the same answer [default: another one each time]
    #[arg(long, value_name = "N")]
    seed: Option<i64>,

    /// End before this text; may be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
}

/// A number that JSON has: NaN and infinity would become null there, which is absence.
fn finite(text: &str) -> Result<f64, String> {
    let number: f64 = text.parse().map_err(|_| format!("expected a number, found `{text}`"))?;
    if number.is_finite() { Ok(number) } else { Err(format!("expected a finite number, found `{text}`")) }
}

impl SamplingArgs {
    /// The flags as a request's body has them.
    fn body(&self) -> Map<String, Value> {
        let fields: [(&str, Value); 7] = [
            ("max_tokens", self.max_tokens.into()),
            ("temperature", self.temperature.into()),
            ("top_p", self.top_p.into()),
            ("top_k", self.top_k.into()),
            ("min_p", self.min_p.into()),
            ("seed", self.seed.into()),
            ("stop", self.stop.clone().into()),
        ];
        fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }
}

/// What to answer.
pub enum Prompt<'a> {
    /// A conversation, through the chat template.
    Messages(&'a [Value]),
    /// The text itself.
    Raw(&'a str),
}

/// A model that answers one prompt after the other in a terminal.
pub struct Terminal {
    runtime: Runtime,
    /// The experts that don't fit the memory.
    store: Option<ExpertStore>,
    profile: Option<KeptProfile>,
    served: Arc<Served>,
    sampling: Map<String, Value>,
}

impl Terminal {
    /// Loads the model, and the adapter if there is one.
    ///
    /// # Errors
    /// When it can't be loaded.
    pub fn start(mut options: EngineOptions, adapter: &AdapterArgs, sampling: &SamplingArgs) -> Result<Self> {
        const NAME: &str = "adapter";
        let source = |directory: &PathBuf| AdapterSource { name: NAME.to_owned(), directory: directory.clone() };
        options.adapters = adapter.adapter.iter().map(source).collect();
        let Engine { runtime, served, store, profile, .. } = engine::start(&options)?;
        let served = served.adapted(NAME)?.map_or(served, Arc::new);
        Ok(Self { runtime, served, store, profile, sampling: sampling.body() })
    }

    /// Whether conversations can be had.
    pub fn has_template(&self) -> bool {
        self.served.template.is_some()
    }

    /// Writes the answer as it comes, and returns it whole. Ctrl-C ends it early.
    ///
    /// # Errors
    /// When a flag is out of range, the prompt doesn't fit, the engine fails, or `out` can't be written to.
    pub async fn answer(&self, prompt: Prompt<'_>, out: &mut impl Write) -> Result<String> {
        let (request, output) = request(&self.served, &self.sampling, prompt)?;
        let mut generation =
            Generation::start(&self.served.machine(), vec![request], output).map_err(ApiError::from)?;
        let mut answer = String::new();
        loop {
            let update = tokio::select! {
                update = generation.next() => update.context("the answer failed")?,
                _ = tokio::signal::ctrl_c() => return Ok(answer),
            };
            match update {
                Some(Update::Delta(delta)) => {
                    answer.push_str(&delta.text);
                    out.write_all(delta.text.as_bytes())?;
                    out.flush()?;
                }
                Some(Update::PromptLogprobs { .. }) => {}
                None => return Ok(answer),
            }
        }
    }

    /// Ends the engine and keeps the routing profile; says on standard error how experts that don't fit the memory fared.
    pub fn end(self) {
        self.runtime.shutdown(Duration::ZERO);
        if let Some(store) = self.store {
            eprintln!("{}", store.counters());
        }
        if let Some(profile) = self.profile {
            profile.keep();
        }
    }
}

/// The engine's request. The flags are read as the HTTP API reads its parameters.
fn request(
    served: &Served,
    sampling: &Map<String, Value>,
    prompt: Prompt<'_>,
) -> Result<(Request, OutputOptions), ApiError> {
    let mut body = sampling.clone();
    if let Prompt::Messages(messages) = prompt {
        body.insert("messages".to_owned(), messages.into());
    }
    let fields = Fields::new(&body);
    let asked = fields.count("max_tokens", 1, u32::MAX)?;
    let max_tokens = asked.map_or(MaxTokens::Default(u32::MAX), MaxTokens::Asked);
    let shared = Shared::parse(fields, served, max_tokens, None)?;
    let prompt = match prompt {
        Prompt::Messages(_) => chat::prompt(served, fields, false)?,
        Prompt::Raw(text) => served.tokenizer.encode(text, true).map_err(ApiError::internal)?,
    };
    let request = shared.request(prompt, served.max_model_len, None)?;
    Ok((request, shared.output))
}

/// A reader that went away, as `head` does, is no failure.
///
/// # Errors
/// All others.
pub fn unless_pipe_closed(result: Result<()>) -> Result<()> {
    match result {
        Err(error) if error.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe) => {
            Ok(())
        }
        other => other,
    }
}

/// A small async runtime: the engine has its own threads.
///
/// # Errors
/// When the system refuses one.
pub fn async_runtime() -> io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

/// The exit status of what Ctrl-C has ended.
pub const INTERRUPTED: i32 = 130;

/// A flag that Ctrl-C sets, and SIGTERM. One who asks again is in a hurry.
pub fn stop_at_signal() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let (runtime, told) = (async_runtime()?, stop.clone());
    let mut terminated = runtime.block_on(async { signal(SignalKind::terminate()) })?;
    std::thread::spawn(move || {
        runtime.block_on(async {
            loop {
                tokio::select! {
                    pressed = tokio::signal::ctrl_c() => if pressed.is_err() { break },
                    _ = terminated.recv() => {}
                }
                if told.swap(true, Ordering::Relaxed) {
                    std::process::exit(INTERRUPTED);
                }
            }
        });
    });
    Ok(stop)
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use serde_json::json;

    use super::*;
    use crate::testing::{Fake, MAX_MODEL_LEN, served};

    #[derive(Parser)]
    struct Flags {
        #[command(flatten)]
        sampling: SamplingArgs,
    }

    fn read(flags: &[&str], prompt: Prompt<'_>) -> Result<(Request, OutputOptions), ApiError> {
        let flags = Flags::parse_from(["cadre"].iter().chain(flags));
        request(&served(Fake::saying("")), &flags.sampling.body(), prompt)
    }

    #[test]
    fn flags_reach_the_engine() {
        let flags = ["--temperature", "0.5", "--top-k", "3", "--seed", "9", "--max-tokens", "7", "--stop", "x"];
        let (request, output) = read(&flags, Prompt::Raw("ab")).unwrap();
        assert_eq!(request.prompt, [97, 98]);
        assert_eq!((request.sampling.temperature, request.sampling.top_k, request.sampling.seed), (0.5, 3, 9));
        assert_eq!((request.stop.max_tokens, output.stop), (7, vec!["x".to_owned()]));
    }

    #[test]
    fn without_flags_the_context_is_the_limit() {
        let messages = [json!({"role": "user", "content": "hi"})];
        let (request, _) = read(&[], Prompt::Messages(&messages)).unwrap();
        assert_eq!(request.prompt.len() + request.stop.max_tokens as usize, MAX_MODEL_LEN);
    }

    #[test]
    fn ranges_are_those_of_the_api() {
        let error = read(&["--temperature", "7"], Prompt::Raw("x")).unwrap_err();
        assert_eq!(error.message, "temperature must be in [0, 2], got 7.0.");
    }
}
