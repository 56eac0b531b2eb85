//! The one error of this crate: every message names the file, what was expected and what was found, or what to do.

use std::io;

/// What can be wrong with a checkpoint, its download, its tokenizer or its chat template.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The name given is neither a directory nor a hub id.
    #[error(
        "`{model}` is neither a directory here nor a hub id: give the path of a checkpoint's directory, or a name like `inclusionAI/Ling-lite`"
    )]
    UnknownModel {
        /// The name given.
        model: String,
    },
    /// The path given is a file.
    #[error("`{path}` is a file: give the directory that holds config.json and the safetensors files")]
    NotADirectory {
        /// The path given.
        path: String,
    },
    /// A file that every checkpoint needs is not there.
    #[error("{checkpoint} has no {file}: {hint}")]
    MissingFile {
        /// The checkpoint's directory or name.
        checkpoint: String,
        /// The file looked for.
        file: String,
        /// What to do.
        hint: &'static str,
    },
    /// The system could not read a file. Servers show this text alone, so it has the reason, which is no source then.
    #[error("cannot read {file}: {reason}")]
    Read {
        /// The file.
        file: String,
        /// What the system said.
        reason: io::Error,
    },
    /// `CADRE_IO` names no way of reading.
    #[error("CADRE_IO is `{name}`: expected `pread` or `io_uring`; or leave it unset")]
    NoSuchIo {
        /// What it is.
        name: String,
    },
    /// The way of reading that `CADRE_IO` asks for can't be had.
    #[error("CADRE_IO asks for io_uring, which this system refuses ({reason}): leave it unset, or set it to `pread`")]
    IoUring {
        /// What the system said.
        reason: io::Error,
    },
    /// A text file is larger than any real one.
    #[error("{file} has {found_bytes} bytes: expected at most {limit_bytes}; it is not the file that its name says")]
    FileTooLarge {
        /// The file.
        file: String,
        /// Its size.
        found_bytes: u64,
        /// The largest size that is read.
        limit_bytes: u64,
    },
    /// A file is not the JSON that it should be.
    #[error("{file} is not valid JSON: {detail}")]
    Json {
        /// The file.
        file: String,
        /// Where and why.
        detail: String,
    },
    /// A field of a JSON file has a value that cannot be used.
    #[error("{file}: {field}: expected {expected}, found {found}")]
    Field {
        /// The file.
        file: String,
        /// The field's name.
        field: String,
        /// What would be right.
        expected: String,
        /// The value found.
        found: String,
    },
    /// No architecture of this `model_type` is registered.
    #[error("{file}: model_type `{found}` is not supported: expected one of {known}")]
    UnknownArchitecture {
        /// The file.
        file: String,
        /// The `model_type` found.
        found: String,
        /// The registered ones.
        known: String,
    },
    /// A safetensors file as a whole is damaged.
    #[error("{file}: {what}: expected {expected}, found {found}; download or pack it again")]
    TensorFile {
        /// The file.
        file: String,
        /// What of it.
        what: &'static str,
        /// What would be right.
        expected: String,
        /// What was found.
        found: String,
    },
    /// One tensor's entry in a safetensors header is damaged or cannot be used.
    #[error("{file}: tensor {tensor}: {what}: expected {expected}, found {found}")]
    TensorEntry {
        /// The file.
        file: String,
        /// The tensor's name.
        tensor: String,
        /// What of it.
        what: &'static str,
        /// What would be right.
        expected: String,
        /// What was found.
        found: String,
    },
    /// The index of a sharded checkpoint and its shards don't agree.
    #[error("{file}: {subject}: expected {expected}, found {found}")]
    Index {
        /// The index file.
        file: String,
        /// The shard or tensor.
        subject: String,
        /// What would be right.
        expected: String,
        /// What was found.
        found: String,
    },
    /// A tensor that the architecture needs is not there.
    #[error("{files}: tensor {tensor} is missing: expected it with shape {expected:?}, found no tensor of that name")]
    MissingTensor {
        /// Where it was looked for.
        files: String,
        /// The tensor's name.
        tensor: String,
        /// The shape that it should have.
        expected: Vec<usize>,
    },
    /// A tensor has another shape than the configuration asks for.
    #[error("{file}: tensor {tensor}: expected shape {expected:?} as config.json has it, found {found:?}")]
    TensorShape {
        /// The file.
        file: String,
        /// The tensor's name.
        tensor: String,
        /// The shape that the configuration asks for.
        expected: Vec<usize>,
        /// The shape found.
        found: Vec<usize>,
    },
    /// Tensors that the architecture has no place for: using the rest would compute another model than was trained.
    #[error("{file}: {count} tensors that this architecture does not use: expected none, found {names} …")]
    ExtraTensors {
        /// The file of the first one.
        file: String,
        /// How many there are.
        count: usize,
        /// The first few names.
        names: String,
    },
    /// A file of a pack can't be used, or belongs to another pack.
    #[error("{file}: {what}: expected {expected}, found {found}; pack the checkpoint again")]
    Pack {
        /// The file.
        file: String,
        /// What of it.
        what: &'static str,
        /// What would be right.
        expected: String,
        /// What was found.
        found: String,
    },
    /// A pack's weights are in the formats that it was made in.
    #[error(
        "{checkpoint} is a pack: expected no format but its own to be asked for, found {asked}; it is {found} as it was packed: leave the format out, or pack the original again"
    )]
    PackFormat {
        /// The pack.
        checkpoint: String,
        /// What was asked for.
        asked: String,
        /// The formats that it has.
        found: String,
    },
    /// What should be packed, or written with other weights, is packed.
    #[error(
        "{checkpoint}: expected a checkpoint that isn't packed, found a pack ({found}): give the one that it was made from"
    )]
    AlreadyPacked {
        /// The pack.
        checkpoint: String,
        /// The formats that it has.
        found: String,
    },
    /// The output directory holds something else.
    #[error("{file} is in the way: expected {expected}, found {found}; give another --output, or empty this one")]
    OutputInTheWay {
        /// The file in the way.
        file: String,
        /// What may lie there.
        expected: String,
        /// What lies there.
        found: String,
    },
    /// The output directory can't be made.
    #[error("cannot create directory {path}; give another --output")]
    CreateDirectory {
        /// The directory.
        path: String,
        /// What the system said.
        source: io::Error,
    },
    /// Two processes write into one directory.
    #[error("{file} is being written by another process: wait until that has ended, or give another --output")]
    BeingWritten {
        /// The file.
        file: String,
    },
    /// The system could not write a file.
    #[error("cannot write {file}; what is finished stays: run the same command again to go on")]
    Write {
        /// The file.
        file: String,
        /// What the system said.
        source: io::Error,
    },
    /// The user ended it.
    #[error("interrupted; what is finished stays: run the same command again to go on")]
    Interrupted,
    /// The hub cannot be reached, and there is no complete copy in the cache.
    #[error(
        "{endpoint} cannot be reached ({detail}) and {cache} holds no complete copy of {model}: check the network, or give a local directory"
    )]
    HubUnreachable {
        /// The hub's address.
        endpoint: String,
        /// The cache's directory.
        cache: String,
        /// The model's id.
        model: String,
        /// What went wrong.
        detail: String,
    },
    /// The hub wants a (different) token.
    #[error(
        "{endpoint} refuses access to {model} (status {status}): accept the model's terms there if it has any, and set HF_TOKEN to a token that may read it"
    )]
    HubRefused {
        /// The hub's address.
        endpoint: String,
        /// The model's id.
        model: String,
        /// The HTTP status.
        status: u16,
    },
    /// The hub has no such model or file.
    #[error("{endpoint} has no {what} (status 404), and there is no such directory here: check the name")]
    HubNotFound {
        /// The hub's address.
        endpoint: String,
        /// The model or file.
        what: String,
    },
    /// A download failed for another reason.
    #[error("download of {what} from {endpoint} failed: {detail}; run again to resume")]
    HubFailed {
        /// The hub's address.
        endpoint: String,
        /// The model or file.
        what: String,
        /// What went wrong.
        detail: String,
    },
    /// The tokenizer cannot be read or used.
    #[error("{file}: {detail}")]
    Tokenizer {
        /// The file.
        file: String,
        /// What went wrong.
        detail: String,
    },
    /// The chat template is not a valid template.
    #[error("{file}: the chat template cannot be compiled: {detail}")]
    TemplateSyntax {
        /// The file that holds it.
        file: String,
        /// Where and why.
        detail: String,
    },
    /// The chat template itself refused the conversation: the caller's mistake.
    #[error("the chat template refuses this conversation: {message}")]
    TemplateRefused {
        /// The template's own words.
        message: String,
    },
    /// The chat template failed on this conversation.
    #[error("the chat template failed: {detail}")]
    TemplateFailed {
        /// Where and why.
        detail: String,
    },
    /// The options given to the chat template contradict each other or the conversation: the caller's mistake.
    #[error("{0}")]
    TemplateOptions(&'static str),
    /// A name of a module to be adapted or trained matches none.
    #[error("target `{target}` matches no module of the model: expected `all-linear`, `experts`, or some of {known}")]
    NoSuchTarget {
        /// The name.
        target: String,
        /// The last components of all modules' names.
        known: String,
    },
    /// A fused adapter covers gate and up, and one of them only was named.
    #[error(
        "{module} is adapted together with its partner in the fused layout: name both gate_proj and up_proj, or ask          for the per-expert layout"
    )]
    HalfTarget {
        /// The module.
        module: String,
    },
    /// PEFT has no dropout on what isn't a module in transformers.
    #[error(
        "PEFT has no dropout on adapters of {parameters}, which are no modules in transformers: use no dropout, other targets, or for experts the layout per-expert"
    )]
    DropoutOnParameters {
        /// Those that would have adapters.
        parameters: String,
    },
    /// An adapter has a tensor that the model has no place for.
    #[error("{file}: no part of this model takes the tensor {tensor}: the adapter was made for another model")]
    AdapterOfAnother {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
    },
    /// What an adapter adds to a tied or normalised head can't be added to its weights.
    #[error(
        "the adapter adapts the head {tensor}, whose weights are also the embedding, or are normalised: what it adds can't be merged into them; serve it as an adapter"
    )]
    HeadNotMerged {
        /// The head's weight.
        tensor: String,
    },
    /// An adapter adds nothing where training always adds something.
    #[error(
        "{adapter}: expected a trained adapter of {tensor}, found only zeros in its lora_A or lora_B: nothing would change; was it trained, and is it the right one?"
    )]
    NothingAdded {
        /// The adapter's directory.
        adapter: String,
        /// The tensor, or those of all experts of a layer.
        tensor: String,
    },
    /// What an adapter adds is too small for the type that weights are stored in.
    #[error(
        "all that the adapter adds to {tensor} is lost in rounding: expected at least one number of it to change; store the weights in a wider type (--dtype f32, into another --output), or serve the adapter as it is"
    )]
    LostInRounding {
        /// The tensor, or those of all experts of a layer.
        tensor: String,
    },
    /// A number can't be stored.
    #[error("tensor {tensor}: expected numbers that {dtype} can hold, found {found} once it is changed")]
    NotStorable {
        /// The tensor.
        tensor: String,
        /// The type.
        dtype: String,
        /// The number.
        found: f32,
    },
    /// Adapters that should be averaged are not of one run.
    #[error("{file}: expected the same {what} as in {first}, found others: give checkpoints of one run")]
    UnlikeAdapters {
        /// The adapter's file.
        file: String,
        /// What of it.
        what: &'static str,
        /// The file of the first one.
        first: String,
    },
    /// An adapter has no tensor.
    #[error("{file} has no adapter of any module of this model")]
    EmptyAdapter {
        /// The file.
        file: String,
    },
    /// A training checkpoint is of another run.
    #[error("{file}: expected {expected}, found {found}")]
    TrainingState {
        /// The file.
        file: String,
        /// What it should have.
        expected: String,
        /// What it has.
        found: String,
    },
    /// What was to be written can't be put into its format.
    #[error("cannot encode what is to be saved: {detail}")]
    Encode {
        /// What went wrong.
        detail: String,
    },
    /// The engine refused.
    #[error(transparent)]
    Engine(#[from] cadre_engine::Error),
}

impl Error {
    /// A [`Error::Field`] from anything that can be shown.
    pub(crate) fn field(file: &str, field: &str, expected: impl ToString, found: impl ToString) -> Self {
        Self::Field {
            file: file.to_owned(),
            field: field.to_owned(),
            expected: expected.to_string(),
            found: found.to_string(),
        }
    }

    /// Whether the one who sent the conversation can mend it, rather than the one who runs the server.
    #[must_use]
    pub fn is_callers_mistake(&self) -> bool {
        matches!(self, Self::TemplateRefused { .. } | Self::TemplateOptions(_) | Self::TemplateFailed { .. })
    }
}
