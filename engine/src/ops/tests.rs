use cadre_kernels::qkv::QkvOptions;
use candle_core::{Device, Var};

use super::*;
use crate::{
    adapter::RowAdapters,
    compute::Compute,
    kv::{KvCache, KvDtype},
    model::{SequenceRows, StepBatch, StepContext},
    nn::{Experts, FfnLayout, Format, Layout, Matrix, Rope, RopeConfig, RopeScaling, RouterOptions, Scores},
    train::places::Place,
};

type TestResult = std::result::Result<(), Error>;

fn matrix(compute: &Compute, n: usize, k: usize) -> std::result::Result<Matrix, Error> {
    Matrix::from_rows(compute, Layout { format: Format::F32, n, k }, |rows, out| {
        out.iter_mut().enumerate().for_each(|(i, x)| *x = ((rows.start * k + i) % 7) as f32 - 3.0);
        Ok::<_, Error>(())
    })
}

fn tracked(rows: usize, width: usize) -> std::result::Result<Tensor, Error> {
    Ok(Var::ones((rows, width), candle_core::DType::F32, &Device::Cpu)?.as_tensor().clone())
}

fn router() -> RouterOptions {
    RouterOptions {
        scores: Scores::Softmax,
        top_k: 1,
        selection_bias: None,
        groups: None,
        normalise: false,
        scale: 1.0,
    }
}

/// Every op of this module, asked for a gradient.
fn outcomes(compute: &Compute) -> std::result::Result<Vec<(&'static str, Result<()>)>, Error> {
    let x = tracked(2, 4)?;
    let weight = matrix(compute, 4, 4)?;
    let layout = FfnLayout { format: Format::F32, hidden: 4, intermediate: 4 };
    let experts = Experts::from_rows(compute, layout, 1, |_, _, _, _| Ok::<_, Error>(()))?;
    let rope =
        Rope::new(RopeConfig { rotary_dim: 2, theta: 1e4, max_position_embeddings: 8, scaling: RopeScaling::Default });
    let options = QkvOptions { num_heads: 1, num_kv_heads: 1, head_dim: 2, bias: None, norm: None, clip: None };
    let batch = StepBatch {
        token_ids: vec![0, 1],
        positions: vec![0, 1],
        sequences: vec![SequenceRows { rows: 0..2, context_len: 2, block_table: vec![0], adapter: None }],
        logit_rows: Vec::new(),
    };
    let mut kv = KvCache::new(1, 1, 4, 1, KvDtype::F32)?;
    let mut step = StepContext { compute, batch: &batch, kv: &mut kv, routes: None, lane: batch.lane() };
    Ok(vec![
        ("linear", linear(compute, &x, &weight, None).map(drop)),
        ("rms_norm", rms_norm(compute, &x, &[1.0; 4], 1e-6).map(drop)),
        ("add", add(compute, &x, &x).map(drop)),
        ("add_adapters", add_adapters(compute, &RowAdapters::default(), Place::Head, &x, x.clone()).map(drop)),
        ("select_rows", select_rows(&x, &[1]).map(drop)),
        ("route", route(&x, &router()).map(drop)),
        ("grouped_ffn", grouped_ffn(compute, &x, &experts, &Routes::dense(2), None).map(drop)),
        ("split_qkv", split_qkv(compute, &tracked(2, 6)?, &[0, 1], &options, &rope).map(drop)),
        ("attention", attention(&mut step, 0, 1.0, &[x.clone(), x.clone(), x.clone()]).map(drop)),
    ])
}

#[test]
fn no_op_cuts_a_gradient_silently() -> TestResult {
    for (name, outcome) in outcomes(&Compute::new(1))? {
        assert!(matches!(outcome, Err(Error::NotDifferentiable { op }) if op == name), "{name}: {outcome:?}");
    }
    Ok(())
}

#[test]
fn wrong_widths_are_errors_that_name_both() -> TestResult {
    let compute = Compute::new(1);
    let x = Tensor::zeros((2, 3), candle_core::DType::F32, &Device::Cpu)?;
    let error = linear(&compute, &x, &matrix(&compute, 4, 4)?, None).unwrap_err().to_string();
    assert_eq!(error, "input of linear: expected shape [4], found [2, 3]");
    assert!(rms_norm(&compute, &x, &[1.0; 4], 1e-6).is_err());
    assert!(select_rows(&x, &[2]).is_err());
    assert!(embed(&matrix(&compute, 4, 4)?, &[4]).is_err());
    Ok(())
}

#[test]
fn linear_and_embed_read_the_same_matrix() -> TestResult {
    let compute = Compute::new(2);
    let weight = matrix(&compute, 20, 3)?;
    let rows = embed(&weight, &[17, 0])?;
    assert_eq!(rows.to_vec2::<f32>()?[0], [51 % 7, 52 % 7, 53 % 7].map(|x| x as f32 - 3.0));
    let unit = Tensor::new(&[[0.0_f32, 1.0, 0.0]], &Device::Cpu)?;
    let column = linear(&compute, &unit, &weight, None)?.to_vec2::<f32>()?;
    assert_eq!(column[0][17], 52_f32 % 7.0 - 3.0);
    Ok(())
}
