//! Progress bars of long waits. They go to standard error and are hidden where that is no terminal.

use cadre_models::{DownloadProgress, LoadProgress};
use indicatif::{ProgressBar, ProgressStyle};

const TEMPLATE: &str = "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}";

/// Runs a download that reports to the bar.
pub fn download<T>(work: impl FnOnce(&dyn Fn(DownloadProgress<'_>)) -> T) -> T {
    let bar = bar();
    let result = work(&|report: DownloadProgress<'_>| {
        if bar.message() != report.file {
            bar.set_message(report.file.to_owned());
        }
        show(&bar, report.done_bytes, report.total_bytes);
    });
    bar.finish_and_clear();
    result
}

/// Runs what goes through all weights and reports to the bar; `name` says what it does.
pub fn weights<T>(name: &'static str, work: impl FnOnce(&(dyn Fn(LoadProgress) + Sync)) -> T) -> T {
    let bar = bar().with_message(name);
    let result = work(&|report: LoadProgress| show(&bar, report.done_bytes, report.total_bytes));
    bar.finish_and_clear();
    result
}

/// Positions are drawn a few times a second; a new length or message is drawn at once, so only when it is new.
fn show(bar: &ProgressBar, done_bytes: u64, total_bytes: u64) {
    if bar.length() != Some(total_bytes) {
        bar.set_length(total_bytes);
    }
    bar.set_position(done_bytes);
}

fn bar() -> ProgressBar {
    let style = ProgressStyle::with_template(TEMPLATE).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(0).with_style(style)
}
