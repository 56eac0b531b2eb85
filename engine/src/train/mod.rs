//! Training: what is trained, the gradients of a step, and how they change it.
//!
//! A step's way through this folder:
//! 1. A [`Batch`] holds whole sequences on one flat axis of tokens, and which of them the loss asks for.
//! 2. [`Trainer::gradients`] walks all batches of a step through the decoder layer by layer, keeps each layer's input
//!    and its routing (and more, as far as memory allows), then walks back. What it doesn't keep is computed again.
//! 3. Frozen weights stay packed, in memory or in the expert store; [`places`] names the matrices, [`trained`] says
//!    what is trained of each: adapters, or the weights themselves.
//! 4. The [`guard`] looks at the loss and the norm; the [`optimizer`] changes the [`parameters`] at the learning rate of
//!    the [`schedule`].
//!
//! The backward passes are written out by hand, in the order of the forward pass reversed: a tape of tensors would
//! hide what a step keeps, and the memory that it takes is the point.

pub mod affinity;
mod attention;
mod batch;
mod dropout;
mod experts;
pub mod guard;
mod head;
mod layer;
mod linear;
pub mod memory;
pub mod optimizer;
pub mod order;
pub mod parameters;
pub mod places;
mod random;
mod routing_noise;
pub mod schedule;
pub mod trained;
mod trainer;
mod whole;
mod workspace;

pub use batch::{Batch, Target};
pub use dropout::Dropout;
pub use routing_noise::{LogitMoments, RoutingNoise};
pub use trainer::{RouterLossOptions, StepLosses, Trainer};
pub use whole::{TrainableModule, trainable_modules};
