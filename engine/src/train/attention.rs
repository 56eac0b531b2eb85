use cadre_kernels::gradient::{self, Heads, QkvGradients};
use cadre_kernels::qkv::{QkNorm, QkvOptions, QkvOut};

use super::{Batch, layer::Walk, linear::Linear, parameters::Gradients, places::Place, workspace::Workspace};
use crate::{Result, nn::Attention};

/// What the backward pass of attention needs of the forward pass.
pub(super) struct AttentionTape {
    /// `[tokens, queries | keys | values]` as projected.
    fused: Vec<f32>,
    /// Queries, keys and values as they meet.
    qkv: [Vec<f32>; 3],
    /// What the output projection takes.
    attended: Vec<f32>,
}

impl AttentionTape {
    pub(super) fn release(self, workspace: &Workspace) {
        self.qkv.into_iter().chain([self.fused, self.attended]).for_each(|buffer| workspace.give(buffer));
    }
}

impl Walk<'_> {
    fn qkv_linear(&self, layer: usize) -> Linear<'_> {
        self.linear(Place::Qkv { layer }, self.parts.layers[layer].attention.qkv.packed())
    }

    fn output_linear(&self, layer: usize) -> Linear<'_> {
        self.linear(Place::AttentionOutput { layer }, self.parts.layers[layer].attention.output.weight.packed())
    }

    /// Attention of layer `layer`: `[tokens, hidden]` to the same.
    pub(super) fn attention(&self, layer: usize, batch: &Batch, x: &[f32]) -> (Vec<f32>, AttentionTape) {
        let attention = &self.parts.layers[layer].attention;
        let (options, heads) = sizes(attention);
        let compute = self.products.compute;
        let fused = self.products.forward(&self.qkv_linear(layer), x);
        let tokens = batch.tokens();
        let (q, kv) = (attention.config.query_rows(), attention.config.kv_rows());
        let workspace = self.products.workspace;
        let [mut query, mut key, mut value] = [q, kv, kv].map(|width| workspace.take(tokens * width));
        let out = QkvOut { query: &mut query, key: &mut key, value: &mut value };
        self.parts.rope.with_table(&batch.positions, |table| {
            cadre_kernels::qkv::split_qkv(&compute.pool, &options, table, &batch.positions, &fused, out);
        });
        let mut attended = workspace.take(tokens * q);
        let parts = [query.as_slice(), &key, &value];
        gradient::attention(&compute.pool, compute.isa, heads, &batch.sequences, parts, &mut attended);
        let mut output = self.products.forward(&self.output_linear(layer), &attended);
        if let Some(bias) = &attention.output.bias {
            output.chunks_exact_mut(bias.len()).for_each(|row| row.iter_mut().zip(bias).for_each(|(y, b)| *y += b));
        }
        (output, AttentionTape { fused, qkv: [query, key, value], attended })
    }

    /// The gradient of attention's input `x` from that of its output.
    pub(super) fn attention_backward(
        &self,
        layer: usize,
        batch: &Batch,
        x: &[f32],
        tape: AttentionTape,
        of_output: &[f32],
        gradients: &mut Gradients,
    ) -> Result<Vec<f32>> {
        let compute = self.products.compute;
        let attention = &self.parts.layers[layer].attention;
        let (options, heads) = sizes(attention);
        let vectors = self.trained.vectors(layer);
        let linear = self.output_linear(layer);
        let AttentionTape { fused, qkv, attended } = tape;
        self.products.parameter_gradients(&linear, &attended, of_output, gradients);
        if let Some(bias) = vectors.output_bias {
            add_rows(of_output, gradients.of(bias));
        }
        let of_attended = self.products.input_gradient(&linear, of_output)?;
        let [query, key, value] = &qkv;
        let workspace = self.products.workspace;
        let mut of_parts = [query, key, value].map(|part| workspace.take(part.len()));
        let [of_query, of_key, of_value] = &mut of_parts;
        gradient::attention_backward(
            &compute.pool,
            compute.isa,
            heads,
            &batch.sequences,
            [query, key, value],
            &of_attended,
            [of_query, of_key, of_value],
        );
        let mut of_fused = workspace.take(fused.len());
        let mut norms = vectors.head_norms.map(|ids| ids.map(|id| gradients.of(id).to_vec()));
        let parts = QkvGradients { query: of_query, key: of_key, value: of_value };
        self.parts.rope.with_table(&batch.positions, |table| {
            let sums = norms.as_mut().map(|norms| norms.each_mut().map(Vec::as_mut_slice));
            let (pool, positions) = (&compute.pool, &batch.positions);
            gradient::split_qkv_backward(
                pool,
                compute.isa,
                &options,
                table,
                positions,
                &fused,
                parts,
                &mut of_fused,
                sums,
            );
        });
        if let (Some(ids), Some(norms)) = (vectors.head_norms, norms) {
            ids.into_iter().zip(norms).for_each(|(id, norm)| gradients.of(id).copy_from_slice(&norm));
        }
        if let Some(bias) = vectors.qkv_bias {
            add_rows(&of_fused, gradients.of(bias));
        }
        let linear = self.qkv_linear(layer);
        self.products.parameter_gradients(&linear, x, &of_fused, gradients);
        let of_input = self.products.input_gradient(&linear, &of_fused)?;
        of_parts
            .into_iter()
            .chain(qkv)
            .chain([of_attended, of_fused, fused, attended])
            .for_each(|buffer| workspace.give(buffer));
        Ok(of_input)
    }
}

fn sizes(attention: &Attention) -> (QkvOptions<'_>, Heads) {
    let config = attention.config;
    let options = QkvOptions {
        num_heads: config.num_heads,
        num_kv_heads: config.num_kv_heads,
        head_dim: config.head_dim,
        bias: attention.qkv_bias.as_deref(),
        norm: attention.norms.as_ref().map(|norms| QkNorm { query: &norms.query, key: &norms.key, eps: norms.eps }),
        clip: config.clip,
    };
    let scale = 1.0 / (config.head_dim as f32).sqrt();
    let (num_heads, num_kv_heads, head_dim) = (config.num_heads, config.num_kv_heads, config.head_dim);
    (options, Heads { num_heads, num_kv_heads, head_dim, scale })
}

/// Adds all rows to one.
fn add_rows(rows: &[f32], sums: &mut [f32]) {
    rows.chunks_exact(sums.len()).for_each(|row| sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += x));
}
