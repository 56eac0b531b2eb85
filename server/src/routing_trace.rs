//! `--trace-routing`: which experts each step used, a JSON line a step, for the cache simulator in `benches`.

use std::{
    fs::File,
    io::{self, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use cadre_engine::{model::LayerRoutes, runtime::StepReport};
use serde_json::json;

/// Lines that are collected before they are written, in bytes.
const BUFFER_BYTES: usize = 64 << 10;

/// A file that grows by a line a step. What is in it are whole lines, also when the disk is full.
#[derive(Debug)]
pub struct RoutingTrace {
    path: PathBuf,
    /// `None` after it could not be written.
    file: Option<File>,
    /// Whole lines that are not in the file yet.
    lines: Vec<u8>,
    written_bytes: u64,
}

impl RoutingTrace {
    /// An empty file at `path`, in place of one that was there.
    ///
    /// # Errors
    /// When it can't be created.
    pub fn create(path: &Path) -> Result<Self> {
        let file = File::create(path)
            .with_context(|| format!("--trace-routing: the file {} can't be created", path.display()))?;
        Ok(Self { path: path.to_owned(), file: Some(file), lines: Vec::new(), written_bytes: 0 })
    }

    /// Notes what the routers chose in a step; writes when there is much, or nothing more to do.
    pub fn note(&mut self, report: &StepReport) {
        if self.file.is_some() && !report.routes.is_empty() {
            self.lines.extend(line(&report.routes).into_bytes());
        }
        let idle = report.running == 0 && report.waiting == 0;
        if idle || self.lines.len() >= BUFFER_BYTES {
            self.flush();
        }
    }

    fn flush(&mut self) {
        let lines = std::mem::take(&mut self.lines);
        let Some(file) = &mut self.file else { return };
        match file.write_all(&lines) {
            Ok(()) => self.written_bytes += lines.len() as u64,
            Err(error) => self.give_up(&error),
        }
    }

    /// Routing goes on untraced: the answers are worth more.
    fn give_up(&mut self, error: &io::Error) {
        tracing::error!(path = %self.path.display(), %error, "the routing trace can't be written: it ends here");
        if let Some(file) = self.file.take() {
            // A part of a line may be there. If it can't be taken back, the error above says why it is there.
            let _ = file.set_len(self.written_bytes);
        }
    }
}

impl Drop for RoutingTrace {
    fn drop(&mut self) {
        self.flush();
    }
}

/// The step's tokens, and of each layer with routed experts those that any token uses, ascending.
fn line(routes: &[LayerRoutes]) -> String {
    let distinct = |layer: &LayerRoutes| {
        let mut experts = layer.routes.experts.clone();
        experts.sort_unstable();
        experts.dedup();
        experts
    };
    let tokens = routes.first().map_or(0, |layer| layer.routes.weights.len() / layer.routes.top_k);
    let experts: Vec<_> = routes.iter().map(distinct).collect();
    format!("{}\n", json!({"tokens": tokens, "experts": experts}))
}

#[cfg(test)]
mod tests {
    use super::*;
    use cadre_engine::ops::Routes;

    fn step(experts: &[u32], running: usize) -> StepReport {
        let routes = Routes { top_k: 2, experts: experts.to_vec(), weights: vec![0.5; experts.len()] };
        let routes = [1, 3].map(|layer| LayerRoutes { layer, routes: routes.clone() }).to_vec();
        StepReport { routes, running, ..StepReport::default() }
    }

    #[test]
    fn a_step_is_a_line_and_lines_are_there_when_nothing_runs() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("trace");
        let read = || std::fs::read_to_string(&path).unwrap();
        let mut trace = RoutingTrace::create(&path).unwrap();
        trace.note(&step(&[0, 5, 3, 5], 1));
        trace.note(&StepReport { running: 1, ..StepReport::default() });
        assert_eq!(read(), "");
        trace.note(&step(&[7, 2], 0));
        let lines = "{\"tokens\":2,\"experts\":[[0,3,5],[0,3,5]]}\n{\"tokens\":1,\"experts\":[[2,7],[2,7]]}\n";
        assert_eq!(read(), lines);
        trace.note(&step(&[1, 4], 1));
        drop(trace);
        assert_eq!(read(), format!("{lines}{{\"tokens\":1,\"experts\":[[1,4],[1,4]]}}\n"));
    }

    #[test]
    fn a_disk_that_is_full_ends_the_trace_and_nothing_else() {
        let mut trace = RoutingTrace::create(Path::new("/dev/full")).unwrap();
        trace.note(&step(&[7, 2], 0));
        assert!(trace.file.is_none());
        trace.note(&step(&[7, 2], 1));
        assert!(trace.lines.is_empty(), "nothing is kept for a file that is gone");
    }

    #[test]
    fn a_file_that_cannot_be_created_is_named() {
        let error = RoutingTrace::create(Path::new("/nowhere/at/all")).unwrap_err();
        assert!(format!("{error:#}").contains("/nowhere/at/all"), "{error:#}");
    }
}
