//! From the names that a user gives to the modules that are trained.

use std::collections::BTreeSet;

use cadre_engine::{
    nn::Decoder,
    train::{TrainableModule, places::Place, trainable_modules},
};

use crate::{Error, Result};

/// All linear modules but the routers and the head.
pub const ALL_LINEAR: &str = "all-linear";
/// All modules but the routers.
pub const ALL: &str = "all";

/// The modules whose weights are trained themselves if a user gives the names `targets`: of modules as on the hub, of what
/// holds them (`experts`, `self_attn`), [`ALL_LINEAR`] or [`ALL`].
///
/// # Errors
/// When a name matches nothing.
pub fn modules_of(decoder: &Decoder, targets: &[String]) -> Result<Vec<TrainableModule>> {
    let modules = trainable_modules(decoder);
    let is_named = |target: &str, module: &TrainableModule| match target {
        ALL => !matches!(module.place, Some(Place::Router { .. })),
        ALL_LINEAR => module.place.is_some_and(is_linear),
        name => names(name, &module.name),
    };
    for target in targets {
        if !modules.iter().any(|module| is_named(target, module)) {
            return Err(no_such_target(target, modules.iter().map(|module| module.name.as_str())));
        }
    }
    Ok(modules.into_iter().filter(|module| targets.iter().any(|target| is_named(target, module))).collect())
}

/// Whether [`ALL_LINEAR`] means a matrix.
pub(crate) fn is_linear(place: Place) -> bool {
    !matches!(place, Place::Router { .. } | Place::Head)
}

/// Whether `target` names the module, or one that holds it.
pub(crate) fn names(target: &str, module: &str) -> bool {
    let whole = format!(".{module}.");
    whole.contains(&format!(".{target}."))
}

/// The last component of a module's name.
pub(crate) fn last(name: &str) -> &str {
    name.rsplit('.').next().unwrap_or(name)
}

/// What is said of a `target` that is none of `modules`.
pub(crate) fn no_such_target<'a>(target: &str, modules: impl Iterator<Item = &'a str>) -> Error {
    let known: BTreeSet<&str> = modules.map(last).collect();
    Error::NoSuchTarget { target: target.to_owned(), known: known.into_iter().collect::<Vec<_>>().join(", ") }
}
