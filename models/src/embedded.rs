//! The checkpoint inside of this binary: what runs when no model is named.

/// What it is called.
pub(crate) const NAME: &str = "cadre-embedded";

/// Its files.
pub(crate) static FILES: &[(&str, &[u8])] = &[
    ("chat_template.jinja", include_bytes!("../embedded/chat_template.jinja")),
    ("config.json", include_bytes!("../embedded/config.json")),
    ("generation_config.json", include_bytes!("../embedded/generation_config.json")),
    ("model.safetensors", include_bytes!("../embedded/model.safetensors")),
    ("tokenizer.json", include_bytes!("../embedded/tokenizer.json")),
    ("tokenizer_config.json", include_bytes!("../embedded/tokenizer_config.json")),
];
