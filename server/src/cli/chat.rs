//! `cadre chat`.

use std::io::{self, BufRead, IsTerminal, Write};

use anyhow::{Result, ensure};
use clap::Args;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::{
    EngineArgs,
    terminal::{AdapterArgs, Prompt, SamplingArgs, Terminal, async_runtime, unless_pipe_closed},
};

const HELP: &str = "/reset  begin a new conversation
/exit   end (so do Ctrl-D, and Ctrl-C here; Ctrl-C in an answer ends the answer)
/help   show this";

/// Flags of `cadre chat`.
#[derive(Debug, Args)]
pub struct ChatArgs {
    /// What the model is told before the conversation
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,

    #[command(flatten)]
    sampling: SamplingArgs,

    #[command(flatten)]
    adapter: AdapterArgs,

    #[command(flatten)]
    engine: EngineArgs,
}

/// Talks until the user ends it.
///
/// # Errors
/// When the model can't be loaded or has no chat template, or the terminal fails.
pub fn run(args: &ChatArgs) -> Result<()> {
    let terminal = Terminal::start(args.engine.options(1), &args.adapter, &args.sampling)?;
    ensure!(terminal.has_template(), "this checkpoint has no chat template; use `cadre generate --raw`");
    let result = async_runtime()?.block_on(talk(&terminal, Conversation::new(args.system.as_deref())));
    terminal.end();
    unless_pipe_closed(result)
}

async fn talk(terminal: &Terminal, mut conversation: Conversation) -> Result<()> {
    let interactive = io::stdin().is_terminal();
    let mut lines = lines();
    if interactive {
        println!("Type a message, or /help.");
    }
    loop {
        if interactive {
            print!("> ");
            io::stdout().flush()?;
        }
        let line = tokio::select! {
            line = lines.recv() => line,
            _ = tokio::signal::ctrl_c() => None,
        };
        let Some(line) = line else { break };
        match line.trim() {
            "" => {}
            "/exit" | "/quit" => return Ok(()),
            "/reset" => conversation.reset(),
            "/help" => println!("{HELP}"),
            text => turn(terminal, &mut conversation, text).await?,
        }
    }
    println!();
    Ok(())
}

/// One question and its answer. A question that can't be answered is taken back.
async fn turn(terminal: &Terminal, conversation: &mut Conversation, text: &str) -> Result<()> {
    conversation.say("user", text);
    match terminal.answer(Prompt::Messages(&conversation.messages), &mut io::stdout()).await {
        Ok(answer) => {
            println!();
            conversation.say("assistant", &answer);
            Ok(())
        }
        Err(error) if error.is::<io::Error>() => Err(error),
        Err(error) => {
            conversation.take_back();
            eprintln!("{error:#} (/reset begins a new conversation)");
            Ok(())
        }
    }
}

/// What has been said.
struct Conversation {
    messages: Vec<Value>,
    instructions: usize,
}

impl Conversation {
    fn new(system: Option<&str>) -> Self {
        let mut conversation = Self { messages: Vec::new(), instructions: 0 };
        if let Some(text) = system {
            conversation.say("system", text);
            conversation.instructions = 1;
        }
        conversation
    }

    fn say(&mut self, role: &str, content: &str) {
        self.messages.push(json!({"role": role, "content": content}));
    }

    fn take_back(&mut self) {
        self.messages.pop();
    }

    fn reset(&mut self) {
        self.messages.truncate(self.instructions);
    }
}

/// Lines of standard input, read on a thread of their own: reading can't be interrupted.
fn lines() -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::channel(1);
    std::thread::spawn(move || {
        for line in io::stdin().lock().lines().map_while(Result::ok) {
            if sender.blocking_send(line).is_err() {
                return;
            }
        }
    });
    receiver
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reset_keeps_the_instructions() {
        let mut conversation = Conversation::new(Some("be short"));
        conversation.say("user", "hi");
        conversation.say("assistant", "hello");
        conversation.reset();
        assert_eq!(conversation.messages, [json!({"role": "system", "content": "be short"})]);
    }

    #[test]
    fn a_question_without_answer_is_taken_back() {
        let mut conversation = Conversation::new(None);
        conversation.say("user", "hi");
        conversation.take_back();
        assert!(conversation.messages.is_empty());
    }
}
