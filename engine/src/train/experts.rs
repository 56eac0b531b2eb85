use cadre_kernels::{
    ffn::{FfnLayout, WeightedRow},
    format::Packed,
    gradient::{RouterLosses, Transposed, gated_silu, gated_silu_backward, route_backward},
    matmul::Inputs,
    router, rows,
};

use super::{LogitMoments, layer::Walk, linear::Linear, parameters::Gradients, places::Place, workspace::Workspace};
use crate::{
    Error, Result,
    compute::Compute,
    experts::Lane,
    nn::{DenseFfn, Ffn, MoeFfn, RoutedExperts, matrices},
    ops::Routes,
};

/// What the backward pass of a feed-forward needs of the forward pass.
pub(super) struct FfnTape {
    /// The router's, if there is one.
    router: Option<RouterTape>,
    /// Gate and up of each expert's rows, of the experts that any token uses, ascending.
    routed: Vec<Vec<f32>>,
    /// The same of the feed-forward that all tokens use.
    shared: Option<Vec<f32>>,
}

pub(super) struct RouterTape {
    /// `[tokens, experts]`, with the noise that took part in the choice.
    pub logits: Vec<f32>,
    /// The choice.
    pub routes: Routes,
    /// Of the logits without the noise; nothing if there is none.
    pub moments: LogitMoments,
}

impl FfnTape {
    pub(super) fn release(self, workspace: &Workspace) {
        self.routed.into_iter().chain(self.shared).for_each(|buffer| workspace.give(buffer));
    }

    pub(super) fn router(&self) -> Option<&RouterTape> {
        self.router.as_ref()
    }
}

/// Some rows of hidden states, or of their gradient.
#[derive(Clone, Copy)]
struct Picked<'a> {
    /// All rows, in the form that the frozen weights take.
    converted: &'a Inputs<'a>,
    /// Which, and how much their output counts.
    rows: &'a [WeightedRow],
    /// Their values; none where nothing is trained that would need them.
    values: &'a [f32],
}

/// All of so many rows, each counting once.
fn all_rows(count: usize) -> Vec<WeightedRow> {
    (0..count as u32).map(|row| WeightedRow { row, weight: 1.0 }).collect()
}

/// The two matrices of a gated feed-forward.
#[derive(Clone, Copy)]
struct Pair<'a> {
    layout: FfnLayout,
    gate_up: Linear<'a>,
    down: Linear<'a>,
}

impl<'a> Pair<'a> {
    /// The same for inputs that are these rows of the batch.
    fn of_rows(self, rows: &'a [WeightedRow]) -> Self {
        Self { gate_up: self.gate_up.of_rows(rows), down: self.down.of_rows(rows), ..self }
    }
}

impl Walk<'_> {
    fn pair<'b>(&'b self, places: [Place; 2], layout: FfnLayout, weights: [Packed<'b>; 2]) -> Pair<'b> {
        let gate_up = Linear { paired: Some(layout.intermediate), ..self.linear(places[0], weights[0]) };
        Pair { layout, gate_up, down: self.linear(places[1], weights[1]) }
    }

    fn routed_pair<'b>(&'b self, layer: usize, expert: usize, layout: FfnLayout, bytes: &'b [u8]) -> Pair<'b> {
        let places = [Place::GateUp { layer, expert }, Place::Down { layer, expert }];
        self.pair(places, layout, matrices(&layout, bytes))
    }

    fn shared_pair<'b>(&'b self, layer: usize, ffn: &'b DenseFfn) -> Pair<'b> {
        let places = [Place::SharedGateUp { layer }, Place::SharedDown { layer }];
        self.pair(places, ffn.weights.layout(), matrices(&ffn.weights.layout(), ffn.weights.data()))
    }

    /// The feed-forward of layer `layer`, `[tokens, hidden]` to the same; the router takes the experts of `replay` if it
    /// is given.
    pub(super) fn ffn(&self, layer: usize, x: &[f32], replay: Option<&[u32]>) -> Result<(Vec<f32>, FfnTape)> {
        match &self.parts.layers[layer].ffn {
            Ffn::Dense(ffn) => {
                let (gate_up, out) = self.shared(layer, ffn, x);
                Ok((out, FfnTape { router: None, routed: Vec::new(), shared: Some(gate_up) }))
            }
            Ffn::Moe(ffn) => self.moe(layer, ffn, x, replay),
        }
    }

    fn moe(&self, layer: usize, ffn: &MoeFfn, x: &[f32], replay: Option<&[u32]>) -> Result<(Vec<f32>, FfnTape)> {
        let pool = &self.products.compute.pool;
        let layout = ffn.experts.layout();
        let router = self.route(layer, ffn, x, replay);
        let groups = router.routes.by_expert(ffn.experts.count());
        let workspace = self.products.workspace;
        let mut out = workspace.zeros(x.len());
        let mut routed = Vec::new();
        let converted = Inputs::new(pool, self.products.compute.isa, layout.format, x, layout.hidden);
        each_expert(&ffn.experts, &groups, |expert, bytes| {
            let rows = &groups[expert];
            let pair = self.routed_pair(layer, expert, layout, bytes).of_rows(rows);
            let values = self.values(pair.gate_up.is_trained(), x, layout.hidden, rows);
            let picked = Picked { converted: &converted, rows, values: &values };
            let (gate_up, outputs) = self.gated(&pair, picked);
            rows::scatter_add(pool, &outputs, layout.hidden, rows, &mut out);
            workspace.give(values);
            workspace.give(outputs);
            routed.push(gate_up);
            Ok(())
        })?;
        let shared = ffn.shared.as_ref().map(|shared| {
            let (gate_up, outputs) = self.shared(layer, shared, x);
            rows::add(pool, &outputs, &mut out);
            workspace.give(outputs);
            gate_up
        });
        Ok((out, FfnTape { router: Some(router), routed, shared }))
    }

    /// The feed-forward that all tokens use: gate and up, and the output.
    fn shared(&self, layer: usize, ffn: &DenseFfn, x: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let FfnLayout { format, hidden, .. } = ffn.weights.layout();
        let compute = self.products.compute;
        let converted = Inputs::new(&compute.pool, compute.isa, format, x, hidden);
        let rows = all_rows(x.len() / hidden);
        self.gated(&self.shared_pair(layer, ffn), Picked { converted: &converted, rows: &rows, values: x })
    }

    /// Rows of `x`, if they are wanted.
    fn values(&self, wanted: bool, x: &[f32], width: usize, rows: &[WeightedRow]) -> Vec<f32> {
        let mut values = self.products.workspace.take(if wanted { rows.len() * width } else { 0 });
        if wanted {
            rows::gather(&self.products.compute.pool, x, width, rows, &mut values);
        }
        values
    }

    fn route(&self, layer: usize, ffn: &MoeFfn, x: &[f32], replay: Option<&[u32]>) -> RouterTape {
        let linear = self.linear(Place::Router { layer }, ffn.router.packed());
        let mut logits = self.products.forward(&linear, x);
        let (top_k, experts) = (ffn.options.top_k, ffn.experts.count());
        let moments = self.noise.map_or(LogitMoments::default(), |noise| {
            let moments = LogitMoments::of(&logits);
            noise.mix(layer, self.products.first_token.get(), experts, &mut logits);
            moments
        });
        let tokens = logits.len() / experts;
        let mut routes = Routes { top_k, experts: vec![0; tokens * top_k], weights: vec![0.0; tokens * top_k] };
        match replay {
            Some(experts) => {
                routes.experts.copy_from_slice(experts);
                router::weigh_chosen(&ffn.options, &logits, &routes.experts, &mut routes.weights);
            }
            None => router::route(&ffn.options, &logits, &mut routes.experts, &mut routes.weights),
        }
        RouterTape { logits, routes, moments }
    }

    /// A gated feed-forward: gate and up, and the output.
    fn gated(&self, pair: &Pair<'_>, x: Picked<'_>) -> (Vec<f32>, Vec<f32>) {
        let compute = self.products.compute;
        let intermediate = pair.layout.intermediate;
        let gate_up = self.products.forward_rows(&pair.gate_up, x.converted, x.rows, x.values);
        let mut inner = self.products.workspace.take(x.rows.len() * intermediate);
        gated_silu(&compute.pool, compute.isa, intermediate, &gate_up, &mut inner);
        let output = self.products.forward(&pair.down, &inner);
        self.products.workspace.give(inner);
        (gate_up, output)
    }

    /// The gradient of a gated feed-forward's input from that of its output before the rows' weights, and the gradient
    /// of these weights.
    fn gated_backward(
        &self,
        pair: &Pair<'_>,
        x: &[f32],
        mut gate_up: Vec<f32>,
        of_output: Picked<'_>,
        gradients: &mut Gradients,
    ) -> Result<(Vec<f32>, Vec<f32>)> {
        let (compute, workspace) = (self.products.compute, self.products.workspace);
        let Picked { converted, rows, values } = of_output;
        let of_down = self.products.gradient(&pair.down, values);
        let mut inner = self.products.input_gradient_rows(&pair.down, converted, rows, &of_down)?;
        let weights: Vec<f32> = rows.iter().map(|row| row.weight).collect();
        let mut of_weights = vec![0.0; weights.len()];
        gated_silu_backward(
            &compute.pool,
            compute.isa,
            pair.layout.intermediate,
            &weights,
            &mut gate_up,
            &mut inner,
            &mut of_weights,
        );
        // Now `inner` is what the second matrix took, times the rows' weights; `gate_up` its own gradient.
        self.products.parameter_gradients(&pair.down, &inner, &of_down, gradients);
        let of_gate_up = self.products.gradient(&pair.gate_up, &gate_up);
        self.products.parameter_gradients(&pair.gate_up, x, &of_gate_up, gradients);
        let of_input = self.products.input_gradient(&pair.gate_up, &of_gate_up)?;
        [of_down.of_inner, of_gate_up.of_inner, inner].into_iter().for_each(|buffer| workspace.give(buffer));
        workspace.give(gate_up);
        Ok((of_input, of_weights))
    }

    /// The gradient of the feed-forward's input `x` from that of its output; `losses` are those on the router.
    pub(super) fn ffn_backward(
        &self,
        layer: usize,
        x: &[f32],
        tape: FfnTape,
        losses: RouterLosses<'_>,
        of_output: &[f32],
        gradients: &mut Gradients,
    ) -> Result<Vec<f32>> {
        let Compute { pool, isa } = self.products.compute;
        let mut of_input = self.products.workspace.zeros(x.len());
        let shared = match &self.parts.layers[layer].ffn {
            Ffn::Dense(ffn) => Some(ffn),
            Ffn::Moe(ffn) => {
                if let Some(router) = tape.router {
                    let routed = (router, tape.routed);
                    self.moe_backward(layer, ffn, x, routed, losses, of_output, &mut of_input, gradients)?;
                }
                ffn.shared.as_ref()
            }
        };
        if let (Some(ffn), Some(gate_up)) = (shared, tape.shared) {
            let pair = self.shared_pair(layer, ffn);
            let FfnLayout { format, hidden, .. } = pair.layout;
            let converted = Inputs::new(pool, *isa, Transposed::format(format), of_output, hidden);
            let rows = all_rows(x.len() / hidden);
            let picked = Picked { converted: &converted, rows: &rows, values: of_output };
            let (of_shared, _) = self.gated_backward(&pair, x, gate_up, picked, gradients)?;
            rows::add(pool, &of_shared, &mut of_input);
            self.products.workspace.give(of_shared);
        }
        Ok(of_input)
    }

    #[allow(clippy::too_many_arguments, reason = "the tape, and the gradients on both sides")]
    fn moe_backward(
        &self,
        layer: usize,
        ffn: &MoeFfn,
        x: &[f32],
        (router, routed): (RouterTape, Vec<Vec<f32>>),
        losses: RouterLosses<'_>,
        of_output: &[f32],
        of_input: &mut [f32],
        gradients: &mut Gradients,
    ) -> Result<()> {
        let Compute { pool, isa } = self.products.compute;
        let layout = ffn.experts.layout();
        let RouterTape { logits, routes, .. } = router;
        let converted = Inputs::new(pool, *isa, Transposed::format(layout.format), of_output, layout.hidden);
        let workspace = self.products.workspace;
        let groups = routes.by_expert(ffn.experts.count());
        let mut of_weights = vec![0.0; routes.weights.len()];
        let mut routed = routed.into_iter();
        each_expert(&ffn.experts, &groups, |expert, bytes| {
            let rows = &groups[expert];
            let pair = self.routed_pair(layer, expert, layout, bytes).of_rows(rows);
            let inputs = self.values(pair.gate_up.is_trained(), x, layout.hidden, rows);
            let of_outputs = self.values(pair.down.is_trained(), of_output, layout.hidden, rows);
            let gate_up = routed.next().unwrap_or_default();
            let picked = Picked { converted: &converted, rows, values: &of_outputs };
            let (of_inputs, dots) = self.gated_backward(&pair, &inputs, gate_up, picked, gradients)?;
            let ones: Vec<_> = rows.iter().map(|row| WeightedRow { weight: 1.0, ..*row }).collect();
            rows::scatter_add(pool, &of_inputs, layout.hidden, &ones, of_input);
            [inputs, of_outputs, of_inputs].into_iter().for_each(|buffer| workspace.give(buffer));
            for (row, dot) in rows.iter().zip(dots) {
                let start = row.row as usize * routes.top_k;
                let slots = start..start + routes.top_k;
                let own = slots.clone().find(|slot| routes.experts[*slot] as usize == expert);
                own.into_iter().for_each(|slot| of_weights[slot] = dot);
            }
            Ok(())
        })?;
        let mut of_logits = vec![0.0; logits.len()];
        route_backward(&ffn.options, &logits, &routes.experts, &of_weights, losses, &mut of_logits);
        if let Some(noise) = self.noise {
            let factor = noise.gradient_factor(layer);
            of_logits.iter_mut().for_each(|value| *value *= factor);
        }
        let linear = self.linear(Place::Router { layer }, ffn.router.packed());
        let gradient = self.products.gradient(&linear, &of_logits);
        self.products.parameter_gradients(&linear, x, &gradient, gradients);
        rows::add(pool, &self.products.input_gradient(&linear, &gradient)?, of_input);
        Ok(())
    }
}

/// Gives `take` the packed bytes of each expert that has rows, in ascending order, from wherever they are.
fn each_expert(
    experts: &RoutedExperts,
    groups: &[Vec<WeightedRow>],
    mut take: impl FnMut(usize, &[u8]) -> Result<()>,
) -> Result<()> {
    let used: Vec<usize> = (0..groups.len()).filter(|&expert| !groups[expert].is_empty()).collect();
    let stored = match experts {
        RoutedExperts::Resident(experts) => {
            return used.into_iter().try_for_each(|expert| take(expert, experts.expert(expert)));
        }
        RoutedExperts::Stored(stored) => stored,
    };
    let (store, layer) = stored.place()?;
    let mut visit = store.visit(layer, &used, Lane::Scan);
    let mut landed = vec![false; used.len()];
    let mut next = 0;
    while next < used.len() {
        if !landed[next] {
            let now = visit.landed().map_err(|error| {
                let rows = groups[error.id.expert as usize].iter().map(|row| row.row).collect();
                Error::Fetch { error, rows }
            })?;
            now.into_iter().for_each(|index| landed[index] = true);
            continue;
        }
        take(used[next], &visit.bytes(next))?;
        visit.release(next..next + 1);
        next += 1;
    }
    Ok(())
}
