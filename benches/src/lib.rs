//! Micro-benchmarks of cadre; see `benches/`. `src/bin/cache_simulator` replays routing traces against cache policies.
