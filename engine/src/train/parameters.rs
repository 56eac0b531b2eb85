//! The table of what is trained, and of its gradients.

use crate::{Error, Result};

/// A tensor that is trained: f32 master values.
#[derive(Debug, Clone, PartialEq)]
pub struct Parameter {
    /// What a checkpoint calls it.
    pub name: String,
    /// Its dimensions.
    pub shape: Vec<usize>,
    /// Row after row; as many as the shape says.
    pub values: Vec<f32>,
}

/// All that is trained, in a fixed order.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Parameters {
    all: Vec<Parameter>,
}

/// The place of a parameter in [`Parameters`], and of its gradient in [`Gradients`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ParameterId(usize);

impl Parameters {
    /// Adds one at the end.
    ///
    /// # Errors
    /// When it has another number of values than its shape says.
    pub fn push(&mut self, parameter: Parameter) -> Result<ParameterId> {
        let Parameter { name, shape, values } = &parameter;
        if shape.iter().product::<usize>() != values.len() {
            return Err(Error::Shape { what: name.clone(), expected: shape.clone(), found: vec![values.len()] });
        }
        self.all.push(parameter);
        Ok(ParameterId(self.all.len() - 1))
    }

    /// The one that [`Parameters::push`] gave this place.
    #[must_use]
    pub fn get(&self, id: ParameterId) -> &Parameter {
        &self.all[id.0]
    }

    /// Lets go of the numbers of one; its place stays, and has none.
    pub(crate) fn remove(&mut self, id: ParameterId) {
        let Parameter { shape, values, .. } = &mut self.all[id.0];
        (*shape, *values) = (vec![0], Vec::new());
    }

    /// All of them, in order.
    pub fn iter(&self) -> impl Iterator<Item = &Parameter> {
        self.all.iter()
    }

    /// All of them, in order, to change their values.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Parameter> {
        self.all.iter_mut()
    }

    /// How many numbers are trained.
    #[must_use]
    pub fn count(&self) -> usize {
        self.all.iter().map(|parameter| parameter.values.len()).sum()
    }

    /// Whether `tables` has a list of numbers for each parameter, as many as it has values.
    pub(super) fn check_sizes<'a>(&self, what: &str, tables: impl Iterator<Item = &'a [f32]>) -> Result<()> {
        let expected: Vec<usize> = self.all.iter().map(|parameter| parameter.values.len()).collect();
        let found: Vec<usize> = tables.map(<[f32]>::len).collect();
        if let Some((parameter, found)) = self.all.iter().zip(&found).find(|(one, found)| one.values.len() != **found) {
            let what = format!("{what} of {}", parameter.name);
            return Err(Error::Shape { what, expected: parameter.shape.clone(), found: vec![*found] });
        }
        if expected.len() != found.len() {
            let what = format!("{what}: the number of parameters");
            return Err(Error::Shape { what, expected: vec![expected.len()], found: vec![found.len()] });
        }
        Ok(())
    }
}

/// Numbers that are summed side by side: the additions of one sum wait for each other.
const LANES: usize = 8;

/// One gradient a parameter, same order and sizes.
#[derive(Debug, Clone, PartialEq)]
pub struct Gradients {
    all: Vec<Vec<f32>>,
}

impl Gradients {
    /// Nothing yet for each of the parameters.
    #[must_use]
    pub fn zeros_like(parameters: &Parameters) -> Self {
        Self { all: parameters.iter().map(|parameter| vec![0.0; parameter.values.len()]).collect() }
    }

    /// That of one parameter, to add to.
    pub fn of(&mut self, id: ParameterId) -> &mut [f32] {
        &mut self.all[id.0]
    }

    /// All of them, in the parameters' order.
    pub fn iter(&self) -> impl Iterator<Item = &[f32]> {
        self.all.iter().map(Vec::as_slice)
    }

    /// Multiplies every number.
    pub fn scale(&mut self, factor: f32) {
        self.all.iter_mut().flatten().for_each(|value| *value *= factor);
    }

    /// The root of the sum of all squares, in f64, summed in a fixed order.
    #[must_use]
    pub fn norm(&self) -> f64 {
        self.iter().map(sum_of_squares).sum::<f64>().sqrt()
    }

    /// Scales all of them so that their norm is at most `max_norm`, by torch's `clip_grad_norm_`: by
    /// `max_norm / (norm + 1e-6)` if that is less than 1. Returns the norm that they had. Gradients that aren't finite
    /// stay as they are.
    pub fn clip(&mut self, max_norm: f64) -> f64 {
        let norm = self.norm();
        let factor = max_norm / (norm + 1e-6);
        if norm.is_finite() && factor < 1.0 {
            self.scale(factor as f32);
        }
        norm
    }
}

fn sum_of_squares(values: &[f32]) -> f64 {
    let square = |value: f32| f64::from(value) * f64::from(value);
    let mut sums = [0.0; LANES];
    let chunks = values.chunks_exact(LANES);
    let rest: f64 = chunks.remainder().iter().map(|value| square(*value)).sum();
    for chunk in chunks {
        for (sum, value) in sums.iter_mut().zip(chunk) {
            *sum += square(*value);
        }
    }
    sums.iter().sum::<f64>() + rest
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parameters(sizes: &[usize]) -> (Parameters, Vec<ParameterId>) {
        let mut all = Parameters::default();
        let named = |size: &usize| Parameter { name: format!("p{size}"), shape: vec![*size], values: vec![0.0; *size] };
        let ids = sizes.iter().map(|size| all.push(named(size)).unwrap()).collect();
        (all, ids)
    }

    #[test]
    fn values_that_do_not_fill_the_shape_are_refused() {
        let parameter = Parameter { name: "router".into(), shape: vec![2, 3], values: vec![0.0; 5] };
        let error = Parameters::default().push(parameter).unwrap_err().to_string();
        assert_eq!(error, "router: expected shape [2, 3], found [5]");
    }

    #[test]
    fn a_gradient_lies_where_its_parameter_does() {
        let (mut all, ids) = parameters(&[3, 4]);
        assert_eq!(all.count(), 7);
        all.iter_mut().for_each(|parameter| parameter.values[2] = 5.0);
        assert_eq!(all.get(ids[1]).values, [0.0, 0.0, 5.0, 0.0]);
        let mut gradients = Gradients::zeros_like(&all);
        gradients.of(ids[1])[3] = 2.0;
        gradients.scale(0.5);
        assert_eq!(gradients.iter().collect::<Vec<_>>(), [&[0.0; 3][..], &[0.0, 0.0, 0.0, 1.0]]);
    }

    #[test]
    fn what_is_not_finite_is_seen_and_not_spread() {
        let (all, ids) = parameters(&[17, 2]);
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut gradients = Gradients::zeros_like(&all);
            gradients.of(ids[0])[0] = 3.0;
            gradients.of(ids[1])[1] = value;
            assert!(!gradients.norm().is_finite(), "{value}");
            assert!(!gradients.clip(1.0).is_finite());
            assert_eq!(gradients.of(ids[0])[0], 3.0, "{value}");
        }
        let mut huge = Gradients::zeros_like(&all);
        huge.of(ids[0]).fill(f32::MAX);
        assert!((huge.norm() / (f64::from(f32::MAX) * 17f64.sqrt()) - 1.0).abs() < 1e-12, "no overflow in f64");
    }

    proptest! {
        #[test]
        fn clipping_bounds_the_norm_and_keeps_the_direction(
            values in prop::collection::vec(-100f32..100.0, 1..70),
            max_norm in 0.01f64..300.0,
        ) {
            let (all, ids) = parameters(&[values.len()]);
            let mut gradients = Gradients::zeros_like(&all);
            gradients.of(ids[0]).copy_from_slice(&values);
            let norm = values.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt();
            let found = gradients.clip(max_norm);
            prop_assert!((found - norm).abs() <= 1e-12 * norm, "{found} against {norm}");
            if norm <= max_norm {
                prop_assert_eq!(gradients.of(ids[0]), &values[..]);
            } else {
                prop_assert!((gradients.norm() - max_norm).abs() <= 1e-4 * max_norm);
                let factor = (max_norm / norm) as f32;
                for (found, value) in gradients.of(ids[0]).iter().zip(&values) {
                    prop_assert!((found - value * factor).abs() <= 1e-4 * (value * factor).abs() + 1e-30);
                }
            }
        }
    }
}
