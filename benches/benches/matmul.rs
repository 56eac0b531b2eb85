//! Dense products: the language head of a few tokens (bound by memory) and a projection of a prefill chunk (bound by
//! arithmetic).

use cadre_kernels::{
    buffer::Buffer,
    format::{Format, Layout, Packed, pack},
    isa::Isa,
    matmul::matmul,
    pool::Pool,
};
use criterion::{BenchmarkId, Criterion, Throughput};

fn products(c: &mut Criterion) {
    let pool = Pool::new(std::thread::available_parallelism().map_or(1, usize::from));
    let isa = Isa::detect();
    let mut group = c.benchmark_group("matmul");
    for (format, rows, n, k) in [
        (Format::Bf16, 1, 49_152, 1024),
        (Format::Bf16, 8, 49_152, 1024),
        (Format::Bf16, 512, 2048, 2048),
        (Format::F32, 1, 16_384, 1024),
        (Format::F32, 512, 2048, 2048),
        (Format::Q8_0, 512, 2048, 2048),
        (Format::Q4_0, 512, 2048, 2048),
        (Format::Q4K, 1, 49_152, 1024),
        (Format::Q4K, 3, 49_152, 1024),
        (Format::Q4K, 8, 49_152, 1024),
        (Format::Q4K, 512, 2048, 2048),
        (Format::Q6K, 512, 2048, 2048),
        (Format::Mxfp4, 512, 2048, 2048),
    ] {
        let layout = Layout { format, n, k };
        let Ok(mut bytes) = Buffer::<u8>::zeroed(layout.bytes()) else { return };
        pack(layout, &vec![0.01; n * k], &mut bytes);
        let weights = Packed::new(layout, &bytes);
        let (x, mut y) = (vec![0.5; rows * k], vec![0.0; rows * n]);
        group.throughput(if rows < 16 {
            Throughput::Bytes(layout.bytes() as u64)
        } else {
            Throughput::Elements((rows * n * k) as u64)
        });
        group.bench_function(BenchmarkId::new(format.to_string(), format!("{rows}x{n}x{k}")), |b| {
            b.iter(|| matmul(&pool, isa, &x, &weights, &mut y));
        });
    }
    group.finish();
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    products(&mut criterion);
    criterion.final_summary();
}
