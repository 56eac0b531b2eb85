//! Weights that are trained themselves: from the decoder to the table of parameters, and back after each update.

use std::ops::Range;

use cadre_kernels::format::Packed;

use super::{
    parameters::{Parameter, ParameterId, Parameters},
    places::{Place, PlaceInfo, places},
    trained::{Trained, TrainedRows, TrainedVectors},
};
use crate::{
    Error, Result,
    compute::Compute,
    nn::{Decoder, ExpertPart, Experts, Ffn, Format, Matrix, Module, RmsNorm, RoutedExperts, matrices},
};

/// A module whose weights can be trained themselves.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainableModule {
    /// Its full name, as on the hub.
    pub name: String,
    /// Its weights; biases, which are few, aren't counted.
    pub numbers: usize,
    /// What they are packed as.
    pub format: Format,
    /// The matrix that they are some rows of; `None`: the embedding's, or a norm's.
    pub place: Option<Place>,
}

/// The modules of a decoder but those whose weights aren't used as they are stored: a normalised head (also if it is the
/// embedding), and the norm before it.
#[must_use]
pub fn trainable_modules(decoder: &Decoder) -> Vec<TrainableModule> {
    let parts = &decoder.parts;
    let module = |module: &Module, inputs, format, place| TrainableModule {
        name: module.name.clone(),
        numbers: module.rows * inputs,
        format,
        place,
    };
    let layout = parts.embedding.layout();
    let mut all = Vec::new();
    if parts.head.is_some() || !parts.norm.is_divided {
        all.extend(parts.embedding.modules().iter().map(|one| module(one, layout.k, layout.format, None)));
    }
    for info in places(decoder) {
        // A tied head is the embedding.
        if info.place != Place::Head || decoder.has_plain_head() {
            all.extend(info.modules.iter().map(|one| module(one, info.inputs, info.format, Some(info.place))));
        }
    }
    let norm = |name: &str, weight: &[f32]| TrainableModule {
        name: name.to_owned(),
        numbers: weight.len(),
        format: Format::F32,
        place: None,
    };
    for layer in &parts.layers {
        let norms = [&layer.attention_norm, &layer.ffn_norm];
        all.extend(norms.map(|one| norm(&one.module, &one.weight)));
        if let Some(norms) = &layer.attention.norms {
            let [query, key] = &norms.modules;
            all.extend([norm(query, &norms.query), norm(key, &norms.key)]);
        }
    }
    all.extend(Some(&parts.norm).filter(|norm| !norm.is_divided).map(|one| norm(&one.module, &one.weight)));
    all
}

impl Trained {
    /// Adds to `parameters` the weights, and biases, of all modules that `is_trained` names.
    ///
    /// # Errors
    /// When one of them is of a format that can't be trained, or lies in the expert store, or isn't as stored.
    pub fn weights(decoder: &Decoder, parameters: &mut Parameters, is_trained: impl Fn(&str) -> bool) -> Result<Self> {
        let parts = &decoder.parts;
        let mut trained = Self::default();
        let mut push =
            |name: String, shape: Vec<usize>, values: Vec<f32>| parameters.push(Parameter { name, shape, values });
        let embedding = &parts.embedding;
        let of_embedding = embedding.modules().iter().map(|module| module.name.as_str()).find(|name| is_trained(name));
        if let Some(name) = of_embedding {
            let values = rows(&embedding.packed(), 0..embedding.layout().n, name)?;
            trained.embedding = Some(push(weight(name), vec![embedding.layout().n, embedding.layout().k], values)?);
        }
        for info in places(decoder) {
            if info.place == Place::Head && parts.head.is_none() {
                let whole = |weight| TrainedRows { rows: 0..info.outputs(), weight };
                let tied = trained.embedding.map(whole);
                trained.of_mut(info.place).weights.extend(tied);
                continue;
            }
            let mut start = 0;
            for module in &info.modules {
                let own = start..start + module.rows;
                start = own.end;
                if is_trained(&module.name) {
                    let values = module_rows(decoder, &info, &own, module)?;
                    let id = push(weight(&module.name), vec![module.rows, info.inputs], values)?;
                    trained.of_mut(info.place).weights.push(TrainedRows { rows: own, weight: id });
                }
            }
        }
        let mut norm = |norm: &RmsNorm| -> Result<Option<ParameterId>> {
            if !is_trained(&norm.module) {
                return Ok(None);
            }
            if norm.is_divided {
                return Err(Error::Config(format!(
                    "{} can't be trained: the head's own norm is folded into it",
                    norm.module
                )));
            }
            Ok(Some(push(weight(&norm.module), vec![norm.weight.len()], norm.weight.clone())?))
        };
        trained.norm = norm(&parts.norm)?;
        for layer in &parts.layers {
            let (attention_norm, ffn_norm) = (norm(&layer.attention_norm)?, norm(&layer.ffn_norm)?);
            trained.vectors.push(TrainedVectors { attention_norm, ffn_norm, ..TrainedVectors::default() });
        }
        for (layer, vectors) in parts.layers.iter().zip(&mut trained.vectors) {
            let attention = &layer.attention;
            let mut vector = |name: String, values: &[f32]| push(name, vec![values.len()], values.to_vec());
            if let Some(norms) =
                attention.norms.as_ref().filter(|norms| norms.modules.iter().all(|name| is_trained(name)))
            {
                let [query, key] = norms.modules.each_ref().map(|name| weight(name));
                vectors.head_norms = Some([vector(query, &norms.query)?, vector(key, &norms.key)?]);
            }
            let biases = [
                (&attention.qkv_bias, attention.qkv.modules(), &mut vectors.qkv_bias),
                (&attention.output.bias, attention.output.weight.modules(), &mut vectors.output_bias),
            ];
            for (bias, modules, id) in biases {
                let Some(bias) = bias.as_ref().filter(|_| modules.iter().all(|module| is_trained(&module.name))) else {
                    continue;
                };
                let names: Vec<&str> = modules.iter().map(|module| module.name.as_str()).collect();
                *id = Some(vector(format!("{}.bias", names.join("+")), bias)?);
            }
        }
        Ok(trained)
    }

    /// Writes what an update made of the weights back into the decoder.
    pub(super) fn write_back(&self, compute: &Compute, decoder: &mut Decoder, parameters: &Parameters) {
        let values = |id: ParameterId| parameters.get(id).values.as_slice();
        let parts = &mut decoder.parts;
        if let Some(id) = self.embedding {
            repack(compute, &mut parts.embedding, &[(0..usize::MAX, values(id))]);
        }
        if let Some(id) = self.norm {
            parts.norm.weight.copy_from_slice(values(id));
        }
        for (layer, vectors) in parts.layers.iter_mut().zip(&self.vectors) {
            let attention = &mut layer.attention;
            let mut pairs = vec![
                (vectors.attention_norm, Some(&mut layer.attention_norm.weight)),
                (vectors.ffn_norm, Some(&mut layer.ffn_norm.weight)),
                (vectors.qkv_bias, attention.qkv_bias.as_mut()),
                (vectors.output_bias, attention.output.bias.as_mut()),
            ];
            if let (Some([query, key]), Some(norms)) = (vectors.head_norms, attention.norms.as_mut()) {
                pairs.extend([(Some(query), Some(&mut norms.query)), (Some(key), Some(&mut norms.key))]);
            }
            for (id, vector) in pairs {
                if let (Some(id), Some(vector)) = (id, vector) {
                    vector.copy_from_slice(values(id));
                }
            }
        }
        for (place, matrix) in self.matrices() {
            let trained: Vec<_> = matrix.weights.iter().map(|own| (own.rows.clone(), values(own.weight))).collect();
            if trained.is_empty() {
                continue;
            }
            match place {
                // A tied one is the embedding.
                Place::Head => parts.head.iter_mut().for_each(|head| repack(compute, head, &trained)),
                Place::Qkv { layer } => repack(compute, &mut parts.layers[layer].attention.qkv, &trained),
                Place::AttentionOutput { layer } => {
                    repack(compute, &mut parts.layers[layer].attention.output.weight, &trained);
                }
                Place::Router { layer } => {
                    if let Ffn::Moe(ffn) = &mut parts.layers[layer].ffn {
                        repack(compute, &mut ffn.router, &trained);
                    }
                }
                Place::GateUp { layer, expert } | Place::Down { layer, expert } => {
                    if let Ffn::Moe(ffn) = &mut parts.layers[layer].ffn
                        && let RoutedExperts::Resident(experts) = &mut ffn.experts
                    {
                        repack_expert(experts, expert, matches!(place, Place::Down { .. }), &trained);
                    }
                }
                Place::SharedGateUp { layer } | Place::SharedDown { layer } => {
                    let shared = match &mut parts.layers[layer].ffn {
                        Ffn::Dense(ffn) => Some(ffn),
                        Ffn::Moe(ffn) => ffn.shared.as_mut(),
                    };
                    let down = matches!(place, Place::SharedDown { .. });
                    shared.into_iter().for_each(|ffn| repack_expert(&mut ffn.weights, 0, down, &trained));
                }
            }
        }
    }
}

fn weight(module: &str) -> String {
    format!("{module}.weight")
}

/// Rows of a packed matrix.
fn rows(packed: &Packed<'_>, rows: Range<usize>, module: &str) -> Result<Vec<f32>> {
    let layout = packed.layout();
    if !matches!(layout.format, Format::F32 | Format::Bf16) {
        return Err(Error::Config(format!(
            "{module} is packed as {}: its weights can be trained as f32 or bf16 only",
            layout.format
        )));
    }
    let mut values = vec![0.0; rows.len() * layout.k];
    rows.zip(values.chunks_exact_mut(layout.k)).for_each(|(row, out)| packed.unpack_row(row, out));
    Ok(values)
}

/// The rows of a module at a place.
fn module_rows(decoder: &Decoder, info: &PlaceInfo, own: &Range<usize>, module: &Module) -> Result<Vec<f32>> {
    let name = module.name.as_str();
    let layers = &decoder.parts.layers;
    let of_expert = |experts: &Experts, expert: usize, down: bool| {
        let [gate_up, down_matrix] = matrices(&experts.layout(), experts.expert(expert));
        if down {
            return rows(&down_matrix, own.clone(), name);
        }
        let intermediate = experts.layout().intermediate;
        let order = own.clone().map(|row| experts.layout().gate_up_row(row % intermediate, row / intermediate));
        let mut values = Vec::with_capacity(own.len() * info.inputs);
        for row in order {
            values.extend(rows(&gate_up, row..row + 1, name)?);
        }
        Ok(values)
    };
    let routed = |layer: usize, expert: usize, down: bool| match &layers[layer].ffn {
        Ffn::Moe(ffn) => match &ffn.experts {
            RoutedExperts::Resident(experts) => of_expert(experts, expert, down),
            RoutedExperts::Stored(_) => Err(Error::Config(format!(
                "{name} is to be trained itself, and the memory doesn't hold it: raise --memory, or train adapters"
            ))),
        },
        Ffn::Dense(_) => Ok(Vec::new()),
    };
    let shared = |layer: usize, down: bool| match &layers[layer].ffn {
        Ffn::Dense(ffn) => of_expert(&ffn.weights, 0, down),
        Ffn::Moe(ffn) => ffn.shared.as_ref().map_or(Ok(Vec::new()), |ffn| of_expert(&ffn.weights, 0, down)),
    };
    let matrix = |matrix: &Matrix| rows(&matrix.packed(), own.clone(), name);
    match info.place {
        Place::Qkv { layer } => matrix(&layers[layer].attention.qkv),
        Place::AttentionOutput { layer } => matrix(&layers[layer].attention.output.weight),
        Place::Router { layer } => match &layers[layer].ffn {
            Ffn::Moe(ffn) => matrix(&ffn.router),
            Ffn::Dense(_) => Ok(Vec::new()),
        },
        Place::GateUp { layer, expert } => routed(layer, expert, false),
        Place::Down { layer, expert } => routed(layer, expert, true),
        Place::SharedGateUp { layer } => shared(layer, false),
        Place::SharedDown { layer } => shared(layer, true),
        Place::Head => matrix(decoder.head()),
    }
}

/// The row of a matrix: trained, or as it was.
fn pick<'a>(trained: &[(Range<usize>, &'a [f32])], row: usize, k: usize) -> Option<&'a [f32]> {
    let own = trained.iter().find(|(rows, _)| rows.contains(&row));
    own.map(|(rows, values)| &values[(row - rows.start) * k..][..k])
}

fn repack(compute: &Compute, matrix: &mut Matrix, trained: &[(Range<usize>, &[f32])]) {
    let layout = matrix.layout();
    let is_whole = trained.iter().map(|(rows, _)| rows.len()).sum::<usize>() >= layout.n;
    let before = if is_whole { Vec::new() } else { matrix.data().to_vec() };
    let before = (!is_whole).then(|| Packed::new(layout, &before));
    matrix.repack(compute, |rows, out| {
        for (row, out) in rows.zip(out.chunks_exact_mut(layout.k)) {
            match (pick(trained, row, layout.k), &before) {
                (Some(values), _) => out.copy_from_slice(values),
                (None, Some(before)) => before.unpack_row(row, out),
                (None, None) => out.fill(0.0),
            }
        }
    });
}

fn repack_expert(experts: &mut Experts, expert: usize, down: bool, trained: &[(Range<usize>, &[f32])]) {
    let layout = experts.layout();
    let before = experts.expert(expert).to_vec();
    let [gate_up, down_matrix] = matrices(&layout, &before);
    experts.repack(expert, |part, rows, out| {
        for (row, out) in
            rows.zip(out.chunks_exact_mut(if part == ExpertPart::Down { layout.intermediate } else { layout.hidden }))
        {
            let up = usize::from(part == ExpertPart::Up);
            // The other matrix stays as it was.
            let own = if (part == ExpertPart::Down) == down { trained } else { &[] };
            match pick(own, row + up * layout.intermediate, out.len()) {
                Some(values) => out.copy_from_slice(values),
                None if part == ExpertPart::Down => down_matrix.unpack_row(row, out),
                None => gate_up.unpack_row(layout.gate_up_row(row, up), out),
            }
        }
    });
}
