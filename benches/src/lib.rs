//! Micro-benchmarks of cadre; see `benches/`.
