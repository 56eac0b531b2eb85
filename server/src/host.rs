//! What this machine has: cores, free memory, and how much of it the process used.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

/// Physical cores that this process may use; hyper-threads of one core count once.
pub fn physical_cores() -> usize {
    let usable = std::thread::available_parallelism().map_or(1, usize::from);
    cores_in(Path::new("/sys/devices/system/cpu")).map_or(usable, |cores| cores.clamp(1, usable))
}

/// Distinct sets of sibling threads, as Linux lists them.
fn cores_in(cpus: &Path) -> Option<usize> {
    let siblings = |entry: fs::DirEntry| fs::read_to_string(entry.path().join("topology/thread_siblings_list")).ok();
    let cores: BTreeSet<String> = fs::read_dir(cpus).ok()?.filter_map(|entry| siblings(entry.ok()?)).collect();
    (!cores.is_empty()).then_some(cores.len())
}

/// What the processor calls itself; its architecture where nobody tells.
pub fn cpu_name() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    name.map_or(std::env::consts::ARCH, |(_, name)| name.trim()).to_owned()
}

/// Where programs of this user keep what can be made again; `None` where nobody tells.
pub fn cache_directory() -> Option<PathBuf> {
    let of = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    of("XDG_CACHE_HOME").or_else(|| Some(of("HOME")?.join(".cache")))
}

/// Bytes that can be had without swapping, within the control group's limit; `None` where nobody tells.
pub fn free_memory_bytes() -> Option<u64> {
    let meminfo = fs::read_to_string("/proc/meminfo").ok();
    let machine = meminfo.and_then(|text| kibibytes(&text, "MemAvailable:"));
    let read = |name| fs::read_to_string(Path::new("/sys/fs/cgroup").join(name)).ok()?.trim().parse::<u64>().ok();
    // What the group has of the page cache makes room when it is needed.
    let cached = fs::read_to_string("/sys/fs/cgroup/memory.stat").map_or(0, |text| cached_bytes(&text));
    let used = read("memory.current").map(|current| current.saturating_sub(cached));
    let group = read("memory.max").zip(used).map(|(max, used)| max.saturating_sub(used));
    machine.into_iter().chain(group).min()
}

/// The file pages of a control group's memory.stat, in bytes.
fn cached_bytes(stat: &str) -> u64 {
    let value = |key| stat.lines().find_map(|line| line.strip_prefix(key)?.trim().parse::<u64>().ok()).unwrap_or(0);
    value("inactive_file ") + value("active_file ")
}

/// The memory that this process uses now; `None` where nobody tells.
pub fn rss_bytes() -> Option<u64> {
    kibibytes(&fs::read_to_string("/proc/self/status").ok()?, "VmRSS:")
}

/// The most memory that this process has used so far; `None` where nobody tells.
pub fn peak_rss_bytes() -> Option<u64> {
    kibibytes(&fs::read_to_string("/proc/self/status").ok()?, "VmHWM:")
}

/// The line `<key> <number> kB`, in bytes.
fn kibibytes(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    let number: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(number * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hyper_threads_of_one_core_count_once() {
        let root = tempfile::tempdir().unwrap();
        for (cpu, siblings) in [("cpu0", "0-1"), ("cpu1", "0-1"), ("cpu2", "2-3"), ("cpu3", "2-3")] {
            let topology = root.path().join(cpu).join("topology");
            fs::create_dir_all(&topology).unwrap();
            fs::write(topology.join("thread_siblings_list"), siblings).unwrap();
        }
        fs::create_dir(root.path().join("cpufreq")).unwrap();
        assert_eq!(cores_in(root.path()), Some(2));
    }

    #[test]
    fn sizes_are_read_in_kibibytes() {
        let text = "VmPeak:\t  99 kB\nVmHWM:\t    12 kB\n";
        assert_eq!(kibibytes(text, "VmHWM:"), Some(12 * 1024));
        assert_eq!(kibibytes(text, "VmSwap:"), None);
    }

    #[test]
    fn file_pages_of_a_group_are_found() {
        assert_eq!(cached_bytes("anon 5\ninactive_anon 9\ninactive_file 30\nactive_file 12\n"), 42);
        assert_eq!(cached_bytes("anon 5\n"), 0);
    }

    #[test]
    fn this_machine_has_a_core() {
        assert!(physical_cores() >= 1);
    }
}
