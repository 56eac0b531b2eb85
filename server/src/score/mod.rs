//! How likely texts are: items of a file in, scores out. The same for every lane, neighbour and budget.
//!
//! [`item`] reads an item and says which passages it is made of, [`result`] puts their scores together, [`run`] takes a whole
//! file through. The passages go one of two ways ([`lane`]): as requests to the runtime ([`steps`]), or layer by layer in
//! super-batches ([`layers`]), for models that are larger than memory.

pub mod item;
pub mod lane;
mod layers;
pub mod result;
pub mod run;
mod steps;
