//! How much memory a run of the binary takes.

use std::{
    fs,
    process::Stdio,
    time::{Duration, Instant},
};

use crate::binary;

/// The most memory that a successful run of `cadre` used, in bytes.
pub fn peak_of(args: &[&str]) -> u64 {
    let mut child = binary::command(args).stdout(Stdio::null()).spawn().expect("cadre starts");
    // The high-water mark can be asked for as long as the process lives; it only rises, so the last answer counts.
    let (mut peak, deadline) = (0, Instant::now() + Duration::from_secs(120));
    let status = loop {
        peak = peak.max(high_water_mark(child.id()).unwrap_or(0));
        if let Some(status) = child.try_wait().expect("its state can be asked") {
            break status;
        }
        assert!(Instant::now() < deadline, "cadre doesn't end");
        std::thread::sleep(Duration::from_micros(500));
    };
    assert!(status.success(), "{status}");
    peak
}

/// `VmHWM` of a process, in bytes.
fn high_water_mark(process: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes << 10)
}
