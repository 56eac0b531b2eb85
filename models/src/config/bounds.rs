//! What no model has: sizes of zero, negative ones, ones that only a damaged file can hold. Checked once for all
//! architectures, before anything is computed from them.

use super::{ConfigFile, shown};
use crate::Result;

/// The largest width, height or count that is believed: a thousand times today's, and products of four of them fit u64.
const HUGE: u64 = 1 << 24;

/// Fields that count something: name, least, most.
const COUNTS: &[(&str, u64, u64)] = &[
    ("hidden_size", 1, HUGE),
    ("vocab_size", 1, HUGE),
    ("intermediate_size", 1, HUGE),
    ("moe_intermediate_size", 1, HUGE),
    ("moe_shared_expert_intermediate_size", 0, HUGE),
    ("shared_expert_intermediate_size", 0, HUGE),
    ("num_hidden_layers", 1, 4096),
    ("num_attention_heads", 1, 65_536),
    ("num_key_value_heads", 1, 65_536),
    ("head_dim", 1, 65_536),
    ("rotary_dim", 1, 65_536),
    ("num_experts", 1, 65_536),
    ("num_experts_per_tok", 1, 65_536),
    ("num_shared_experts", 0, 65_536),
    ("n_group", 1, 65_536),
    ("topk_group", 1, 65_536),
    ("first_k_dense_replace", 0, 4096),
    ("num_nextn_predict_layers", 0, 4096),
    ("decoder_sparse_step", 1, 4096),
    ("max_position_embeddings", 1, 1 << 31),
];

/// Fields that measure something: name, what is exceeded, most.
const MEASURES: &[(&str, f64, f64)] = &[
    ("rms_norm_eps", 0.0, 1.0),
    ("rope_theta", 0.0, 1e15),
    ("partial_rotary_factor", 0.0, 1.0),
    ("routed_scaling_factor", 0.0, 1e6),
    ("clip_qkv", 0.0, 1e30),
];

/// Pairs of which the first may not exceed the second.
const ORDERED: &[(&str, &str)] = &[
    ("num_experts_per_tok", "num_experts"),
    ("topk_group", "n_group"),
    ("num_key_value_heads", "num_attention_heads"),
];

/// Pairs of which the first must divide the second.
const DIVIDING: &[(&str, &str)] = &[("num_key_value_heads", "num_attention_heads"), ("n_group", "num_experts")];

/// Refuses a configuration that no model can have.
pub(super) fn check(config: &ConfigFile) -> Result<()> {
    for (field, least, most) in COUNTS {
        let Some(value) = config.get(field) else { continue };
        if !value.as_u64().is_some_and(|count| (*least..=*most).contains(&count)) {
            return Err(config.error(field, format!("a whole number from {least} to {most}"), shown(Some(value))));
        }
    }
    for (field, above, most) in MEASURES {
        let Some(value) = config.get(field) else { continue };
        if !value.as_f64().is_some_and(|measure| measure > *above && measure <= *most) {
            return Err(config.error(field, format!("a number above {above} and at most {most}"), shown(Some(value))));
        }
    }
    for (smaller, larger) in ORDERED {
        if let (Some(small), Some(large)) = (config.count(smaller)?, config.count(larger)?)
            && small > large
        {
            return Err(config.error(smaller, format!("at most {larger}, which is {large}"), small));
        }
    }
    for (divisor, whole) in DIVIDING {
        if let (Some(divisor_value), Some(whole_value)) = (config.count(divisor)?, config.count(whole)?)
            && !whole_value.is_multiple_of(divisor_value)
        {
            return Err(config.error(divisor, format!("a divisor of {whole}, which is {whole_value}"), divisor_value));
        }
    }
    check_kept_experts(config)?;
    match config.get("quantization_config") {
        Some(found) => {
            Err(config.error("quantization_config", "none: quantised weights cannot be read yet", shown(Some(found))))
        }
        None => Ok(()),
    }
}

/// The groups that stay must hold as many experts as a token uses.
fn check_kept_experts(config: &ConfigFile) -> Result<()> {
    let count = |field| config.count(field);
    let (experts, used) = (count("num_experts")?, count("num_experts_per_tok")?);
    if let (Some(experts), Some(used), Some(groups), Some(kept)) =
        (experts, used, count("n_group")?, count("topk_group")?)
        && kept * (experts / groups) < used
    {
        let expected = format!("groups that hold {used} experts (num_experts_per_tok), {} in each", experts / groups);
        return Err(config.error("topk_group", expected, kept));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::tests::read;

    #[test]
    fn refuses_values_that_no_model_has() {
        for (field, value) in [
            ("hidden_size", "0"),
            ("hidden_size", "-1"),
            ("hidden_size", "1.5"),
            ("hidden_size", "\"8\""),
            ("hidden_size", "18446744073709551615"),
            ("hidden_size", "1e300"),
            ("num_hidden_layers", "1000000000"),
            ("num_experts", "0"),
            ("vocab_size", "99999999999999999999"),
            ("rms_norm_eps", "0"),
            ("rms_norm_eps", "-1e-6"),
            ("rope_theta", "1e200"),
            ("partial_rotary_factor", "1.5"),
            ("max_position_embeddings", "true"),
        ] {
            let error = read(&format!("{{\"{field}\": {value}}}")).unwrap_err().to_string();
            assert!(error.starts_with(&format!("config.json: {field}: expected a")), "{field} = {value}: {error}");
        }
        for (text, field) in [
            (r#"{"num_experts": 4, "num_experts_per_tok": 5}"#, "num_experts_per_tok"),
            (r#"{"n_group": 2, "topk_group": 3}"#, "topk_group"),
            (r#"{"num_attention_heads": 2, "num_key_value_heads": 4}"#, "num_key_value_heads"),
        ] {
            let error = read(text).unwrap_err().to_string();
            assert!(error.starts_with(&format!("config.json: {field}: expected at most")), "{error}");
        }
        for (text, expected) in [
            (r#"{"num_attention_heads": 4, "num_key_value_heads": 3}"#, "num_key_value_heads: expected a divisor of"),
            (
                r#"{"num_experts": 16, "n_group": 32}"#,
                "n_group: expected a divisor of num_experts, which is 16, found 32",
            ),
            (r#"{"num_experts": 16, "n_group": 3}"#, "n_group: expected a divisor of"),
            (
                r#"{"num_experts": 16, "num_experts_per_tok": 2, "n_group": 16, "topk_group": 1}"#,
                "topk_group: expected groups that hold 2 experts",
            ),
            (r#"{"clip_qkv": 0}"#, "clip_qkv: expected a number above 0"),
            (r#"{"quantization_config": {"quant_method": "gptq"}}"#, "quantization_config: expected none"),
        ] {
            let error = read(text).unwrap_err().to_string();
            assert!(error.starts_with(&format!("config.json: {expected}")), "{error}");
        }
        assert!(read(r#"{"rms_norm_eps": 1e999}"#).is_err());
    }

    #[test]
    fn null_is_absence() {
        assert!(read(r#"{"head_dim": null, "rotary_dim": null}"#).is_ok());
    }
}
