use std::{
    cell::{Cell, RefCell},
    sync::Arc,
};

use cadre_kernels::gradient::{self, RouterLosses};

use super::{
    Batch, Dropout, LogitMoments, RoutingNoise,
    layer::{LayerTape, Walk},
    linear::Products,
    parameters::{Gradients, Parameters},
    trained::Trained,
    workspace::Workspace,
};
use crate::{
    Error, Result,
    compute::Compute,
    nn::{Decoder, Ffn},
};

/// The losses on the routers beside the model's own.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct RouterLossOptions {
    /// The coefficient of the load-balancing loss, taken over all layers and tokens of the step together, as
    /// transformers does.
    pub balance: f32,
    /// The coefficient of the z-loss, the mean over layers and tokens.
    pub z: f32,
}

/// The losses of a step.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct StepLosses {
    /// The mean cross-entropy of the targets.
    pub cross_entropy: f64,
    /// The load-balancing loss, before its coefficient.
    pub balance: f64,
    /// The z-loss, before its coefficient.
    pub z: f64,
    /// Targets.
    pub targets: usize,
    /// Of them, how many got the highest logit.
    pub correct: usize,
    /// Tokens.
    pub tokens: usize,
    /// How often each expert of each layer was chosen; empty for layers without a router.
    pub loads: Vec<Vec<u64>>,
    /// Of each layer's router, without the noise; empty if there was none.
    pub logits: Vec<LogitMoments>,
}

/// A decoder that is trained, or some parts of it.
pub struct Trainer {
    compute: Compute,
    decoder: Arc<Decoder>,
    trained: Trained,
    /// What is trained.
    pub parameters: Parameters,
    router_losses: RouterLossOptions,
    /// What adapters don't take of their inputs in [`Trainer::gradients`].
    pub dropout: Option<Dropout>,
    /// What takes part in the choice of experts in [`Trainer::gradients`].
    pub routing_noise: Option<RoutingNoise>,
    workspace: Workspace,
    /// The layers from this one on keep all that their backward pass needs; those before keep their input and routing,
    /// and are computed again.
    keep_from: usize,
}

/// What a forward pass leaves for the backward pass.
struct Forward {
    /// For each layer the input of each batch.
    inputs: Vec<Vec<Vec<f32>>>,
    /// For each layer the experts that each batch chose.
    routes: Vec<Vec<Vec<u32>>>,
    /// For each layer what each batch kept.
    tapes: Vec<Vec<Option<LayerTape>>>,
    /// The last layer's output for each batch.
    hidden: Vec<Vec<f32>>,
}

/// Sums over the routers of a step.
#[derive(Default)]
struct RouterSums {
    /// For each layer and expert.
    loads: Vec<Vec<u64>>,
    /// For each expert, over layers and tokens.
    probabilities: Vec<f64>,
    squares: f64,
    /// Layers times tokens.
    rows: usize,
    /// For each layer, if there is noise.
    logits: Vec<LogitMoments>,
}

impl Trainer {
    /// Trains what `trained` says of `decoder`; its numbers are `parameters`. A decoder that is served meanwhile takes
    /// adapters only.
    ///
    /// # Errors
    /// When a load-balancing loss is wanted, and layers have different numbers of experts.
    pub fn new(
        compute: Compute,
        decoder: impl Into<Arc<Decoder>>,
        trained: Trained,
        parameters: Parameters,
        router_losses: RouterLossOptions,
    ) -> Result<Self> {
        let decoder = decoder.into();
        let mut counts: Vec<usize> = decoder.parts.layers.iter().filter_map(|layer| experts(&layer.ffn)).collect();
        counts.dedup();
        if counts.len() > 1 && router_losses.balance != 0.0 {
            return Err(Error::Config(format!(
                "the load-balancing loss needs as many experts in each layer, found {counts:?}"
            )));
        }
        Ok(Self {
            compute,
            decoder,
            trained,
            parameters,
            router_losses,
            dropout: None,
            routing_noise: None,
            workspace: Workspace::default(),
            keep_from: 0,
        })
    }

    /// Layers before `layer` keep their input and routing only, and are computed again in the backward pass. Gradients
    /// stay the same, bit for bit.
    pub fn keep_from(&mut self, layer: usize) {
        self.keep_from = layer;
    }

    /// Keeps the buffers of a step within so many bytes, as far as a step allows: layers' inputs, what is kept for the backward
    /// pass, and the work of a layer or the head.
    pub fn limit_memory(&self, bytes: u64) {
        self.workspace.limit(bytes);
    }

    /// Writes the parameters that are weights themselves back into the decoder: to be called after each update.
    ///
    /// # Errors
    /// When there are some, and somebody else uses the decoder.
    pub fn write_back(&mut self) -> Result<()> {
        if !self.trained.has_weights() {
            return Ok(());
        }
        let in_use =
            || Error::Config("the weights are in use elsewhere: they can't be trained, adapters of them can".into());
        let decoder = Arc::get_mut(&mut self.decoder).ok_or_else(in_use)?;
        self.trained.write_back(&self.compute, decoder, &self.parameters);
        Ok(())
    }

    /// The losses of the batches together, and their gradients.
    ///
    /// # Errors
    /// When there is no target, an id lies outside of the vocabulary, or an expert can't be read.
    pub fn gradients(&self, batches: &[Batch]) -> Result<(StepLosses, Gradients)> {
        let mut gradients = Gradients::zeros_like(&self.parameters);
        let (mut losses, mut sums) = (self.counted(batches)?, RouterSums::default());
        let walk = self.walk(self.dropout, self.routing_noise.as_ref());
        let firsts = first_tokens(batches);
        let mut forward = self.forward(&walk, batches, true, &mut sums)?;
        let weight = 1.0 / losses.targets as f32;
        let mut of_hidden = Vec::new();
        for ((batch, first), hidden) in batches.iter().zip(&firsts).zip(std::mem::take(&mut forward.hidden)) {
            walk.products.first_token.set(*first);
            let (found, gradient) = walk.head(self.decoder.head(), batch, &hidden, weight, Some(&mut gradients))?;
            losses.cross_entropy += found.loss / losses.targets as f64;
            losses.correct += found.correct;
            of_hidden.push(gradient);
        }
        let balance = self.balance_gradient(&sums);
        for layer in (0..self.decoder.parts.layers.len()).rev() {
            let inputs = forward.inputs.pop().unwrap_or_default();
            let (routes, tapes) = (forward.routes.pop().unwrap_or_default(), forward.tapes.pop().unwrap_or_default());
            let z = if sums.rows == 0 { 0.0 } else { self.router_losses.z / sums.rows as f32 };
            let kept = inputs.into_iter().zip(routes).zip(tapes);
            let walked = batches.iter().zip(&firsts).zip(&mut of_hidden);
            for (((input, routes), tape), ((batch, first), gradient)) in kept.zip(walked) {
                walk.products.first_token.set(*first);
                let tape = match tape {
                    Some(tape) => tape,
                    None => {
                        let (output, tape) = walk.layer(layer, batch, &input, Some(&routes))?;
                        self.workspace.give(output);
                        tape
                    }
                };
                let losses = RouterLosses { balance: &balance, z };
                walk.layer_backward(layer, batch, &input, tape, losses, gradient, &mut gradients)?;
                self.workspace.give(input);
            }
        }
        if let Some(id) = self.trained.embedding {
            let width = self.decoder.parts.embedding.layout().k;
            let sums = gradients.of(id);
            for (batch, of_hidden) in batches.iter().zip(of_hidden) {
                let rows = batch.token_ids.iter().zip(of_hidden.chunks_exact(width));
                for (token, row) in rows.filter(|(token, _)| Some(**token) != self.decoder.parts.padding_token) {
                    let sums = &mut sums[*token as usize * width..][..width];
                    sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
                }
            }
        }
        self.finish(&mut losses, sums);
        self.workspace.end_step();
        Ok((losses, gradients))
    }

    /// The losses of the batches together.
    ///
    /// # Errors
    /// As for [`Trainer::gradients`].
    pub fn losses(&self, batches: &[Batch]) -> Result<StepLosses> {
        let (mut losses, mut sums) = (self.counted(batches)?, RouterSums::default());
        let walk = self.walk(None, None);
        let forward = self.forward(&walk, batches, false, &mut sums)?;
        for (batch, hidden) in batches.iter().zip(forward.hidden) {
            let (found, _) = walk.head(self.decoder.head(), batch, &hidden, 0.0, None)?;
            losses.cross_entropy += found.loss / losses.targets as f64;
            losses.correct += found.correct;
        }
        self.finish(&mut losses, sums);
        self.workspace.end_step();
        Ok(losses)
    }

    /// How often each expert of each layer is chosen for the tokens of the batches; empty for layers without a router.
    ///
    /// # Errors
    /// When an id lies outside of the vocabulary, or an expert can't be read.
    pub fn loads(&self, batches: &[Batch]) -> Result<Vec<Vec<u64>>> {
        let mut sums = RouterSums::default();
        self.counted(batches)?;
        self.forward(&self.walk(None, None), batches, false, &mut sums)?;
        self.workspace.end_step();
        Ok(sums.loads)
    }

    fn walk<'a>(&'a self, dropout: Option<Dropout>, noise: Option<&'a RoutingNoise>) -> Walk<'a> {
        let products = Products {
            compute: &self.compute,
            parameters: &self.parameters,
            workspace: &self.workspace,
            room: RefCell::default(),
            dropout,
            first_token: Cell::new(0),
        };
        Walk { products, parts: &self.decoder.parts, trained: &self.trained, noise }
    }

    fn counted(&self, batches: &[Batch]) -> Result<StepLosses> {
        let targets = batches.iter().map(|batch| batch.targets.len()).sum();
        if targets == 0 {
            return Err(Error::Config("a step needs at least one target token, found none".into()));
        }
        let vocab = self.decoder.parts.embedding.layout().n;
        let ids = batches.iter().flat_map(|batch| &batch.token_ids);
        if let Some(id) = ids.copied().find(|id| *id as usize >= vocab) {
            return Err(Error::Config(format!("token id {id} is outside of the vocabulary of {vocab}")));
        }
        let tokens = batches.iter().map(Batch::tokens).sum();
        Ok(StepLosses { targets, tokens, ..StepLosses::default() })
    }

    /// All layers, one after the other, each over all batches: a layer's weights are read once.
    fn forward(&self, walk: &Walk<'_>, batches: &[Batch], keeps: bool, sums: &mut RouterSums) -> Result<Forward> {
        let table = &self.decoder.parts.embedding;
        let width = table.layout().k;
        let embed = |batch: &Batch| {
            let mut hidden = self.workspace.take(batch.tokens() * width);
            for (id, row) in batch.token_ids.iter().zip(hidden.chunks_exact_mut(width)) {
                table.packed().unpack_row(*id as usize, row);
            }
            hidden
        };
        let mut hidden: Vec<Vec<f32>> = batches.iter().map(embed).collect();
        let (mut inputs, mut routes, mut tapes) = (Vec::new(), Vec::new(), Vec::new());
        let firsts = first_tokens(batches);
        for (layer, parts) in self.decoder.parts.layers.iter().enumerate() {
            let mut load = vec![0; experts(&parts.ffn).unwrap_or(0)];
            let mut moments = LogitMoments::default();
            let (mut layer_routes, mut layer_tapes, mut outputs) = (Vec::new(), Vec::new(), Vec::new());
            for ((batch, first), input) in batches.iter().zip(&firsts).zip(&hidden) {
                walk.products.first_token.set(*first);
                let (output, tape) = walk.layer(layer, batch, input, None)?;
                outputs.push(output);
                let chosen = tape.router().map_or(Vec::new(), |router| router.routes.experts.clone());
                chosen.iter().for_each(|expert| load[*expert as usize] += 1);
                if let (Some(router), Ffn::Moe(ffn)) = (tape.router(), &parts.ffn) {
                    sums.probabilities.resize(load.len(), 0.0);
                    sums.squares += gradient::scores(ffn.options.scores, &router.logits, &mut sums.probabilities);
                    sums.rows += batch.tokens();
                    moments.add(router.moments);
                }
                if keeps {
                    layer_routes.push(chosen);
                }
                if keeps && layer >= self.keep_from {
                    layer_tapes.push(Some(tape));
                } else {
                    layer_tapes.push(None);
                    tape.release(&self.workspace);
                }
            }
            sums.loads.push(load);
            sums.logits.extend(walk.noise.map(|_| moments));
            let layer_inputs = std::mem::replace(&mut hidden, outputs);
            if keeps {
                inputs.push(layer_inputs);
                routes.push(layer_routes);
                tapes.push(layer_tapes);
            } else {
                layer_inputs.into_iter().for_each(|input| self.workspace.give(input));
            }
        }
        Ok(Forward { inputs, routes, tapes, hidden })
    }

    /// How often each expert was chosen, as a share of all layers' tokens.
    fn shares(sums: &RouterSums) -> Vec<f64> {
        let mut counts = vec![0; sums.probabilities.len()];
        sums.loads.iter().for_each(|load| counts.iter_mut().zip(load).for_each(|(count, load)| *count += load));
        counts.into_iter().map(|count| count as f64 / sums.rows as f64).collect()
    }

    /// The gradient of the load-balancing loss of each expert's probability in a row.
    fn balance_gradient(&self, sums: &RouterSums) -> Vec<f32> {
        if self.router_losses.balance == 0.0 || sums.rows == 0 {
            return Vec::new();
        }
        let factor = f64::from(self.router_losses.balance) * sums.probabilities.len() as f64 / sums.rows as f64;
        Self::shares(sums).into_iter().map(|share| (factor * share) as f32).collect()
    }

    fn finish(&self, losses: &mut StepLosses, sums: RouterSums) {
        if sums.rows > 0 {
            let rows = sums.rows as f64;
            let products = Self::shares(&sums).into_iter().zip(&sums.probabilities).map(|(share, p)| share * p / rows);
            losses.balance = products.sum::<f64>() * sums.probabilities.len() as f64;
            losses.z = sums.squares / rows;
        }
        losses.loads = sums.loads;
        losses.logits = sums.logits;
    }
}

/// The number in the step of each batch's first token.
fn first_tokens(batches: &[Batch]) -> Vec<usize> {
    let mut next = 0;
    let first = |batch: &Batch| {
        next += batch.tokens();
        next - batch.tokens()
    };
    batches.iter().map(first).collect()
}

/// How many experts a router chooses from.
fn experts(ffn: &Ffn) -> Option<usize> {
    match ffn {
        Ffn::Dense(_) => None,
        Ffn::Moe(ffn) => Some(ffn.experts.count()),
    }
}
