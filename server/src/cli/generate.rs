//! `cadre generate`.

use std::io::{self, Read, Write};

use anyhow::{Context, Result};
use clap::Args;
use serde_json::json;

use super::{
    EngineArgs,
    terminal::{AdapterArgs, Prompt, SamplingArgs, Terminal, async_runtime, unless_pipe_closed},
};

/// Flags of `cadre generate`.
#[derive(Debug, Args)]
pub struct GenerateArgs {
    /// The prompt; `-` reads it from standard input
    #[arg(long, short, value_name = "TEXT")]
    prompt: String,

    /// What the model is told before the prompt
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    system: Option<String>,

    /// Continue the prompt as it is, without the chat template
    #[arg(long)]
    raw: bool,

    #[command(flatten)]
    sampling: SamplingArgs,

    #[command(flatten)]
    adapter: AdapterArgs,

    #[command(flatten)]
    engine: EngineArgs,
}

/// Streams the answer to standard output.
///
/// # Errors
/// When the model can't be loaded, or the answer fails.
pub fn run(args: &GenerateArgs) -> Result<()> {
    let prompt = read_prompt(&args.prompt)?;
    let terminal = Terminal::start(args.engine.options(1), &args.adapter, &args.sampling)?;
    // A checkpoint without a template is a base model: it continues texts.
    let result = if args.raw || !terminal.has_template() {
        stream(&terminal, Prompt::Raw(&prompt))
    } else {
        let system = args.system.iter().map(|text| json!({"role": "system", "content": text}));
        let user = json!({"role": "user", "content": prompt});
        let messages: Vec<_> = system.chain([user]).collect();
        stream(&terminal, Prompt::Messages(&messages))
    };
    terminal.end();
    unless_pipe_closed(result)
}

fn stream(terminal: &Terminal, prompt: Prompt<'_>) -> Result<()> {
    let mut out = io::stdout().lock();
    async_runtime()?.block_on(terminal.answer(prompt, &mut out))?;
    writeln!(out)?;
    Ok(())
}

fn read_prompt(prompt: &str) -> Result<String> {
    if prompt != "-" {
        return Ok(prompt.to_owned());
    }
    let mut text = String::new();
    io::stdin().read_to_string(&mut text).context("cannot read the prompt from standard input")?;
    Ok(text)
}
