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

/// Bytes that can be had without swapping, within the limits of all control groups that the process is in; `None` where
/// nobody tells.
pub fn free_memory_bytes() -> Option<u64> {
    let meminfo = fs::read_to_string("/proc/meminfo").ok();
    let machine = meminfo.and_then(|text| kibibytes(&text, "MemAvailable:"));
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let groups = control_groups(Path::new("/sys/fs/cgroup"), &groups);
    machine.into_iter().chain(groups.iter().filter_map(|group| free_in_group(group))).min()
}

/// The control groups that `/proc/self/cgroup` names, with those around them, of both versions: see cgroups(7).
/// Some may not be there: a container may see its own group as the root.
fn control_groups(root: &Path, text: &str) -> BTreeSet<PathBuf> {
    let mut groups = BTreeSet::new();
    for line in text.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next()) else { continue };
        let mount = match controllers {
            "" => root.to_owned(),
            _ if controllers.split(',').any(|controller| controller == "memory") => root.join(controllers),
            _ => continue,
        };
        let inner = Path::new(path.trim_start_matches('/'));
        groups.extend(inner.ancestors().map(|group| mount.join(group)));
    }
    groups
}

/// What a control group's limit leaves, if it has one.
fn free_in_group(group: &Path) -> Option<u64> {
    let read = |names: [&str; 2]| {
        let text = names.iter().find_map(|name| fs::read_to_string(group.join(name)).ok())?;
        text.trim().parse::<u64>().ok()
    };
    let limit = read(["memory.max", "memory.limit_in_bytes"])?;
    let used = read(["memory.current", "memory.usage_in_bytes"])?;
    // What the group has of the page cache makes room when it is needed.
    let cached = fs::read_to_string(group.join("memory.stat")).map_or(0, |text| cached_bytes(&text));
    Some(limit.saturating_sub(used.saturating_sub(cached)))
}

/// The file pages of a control group's memory.stat, in bytes.
fn cached_bytes(stat: &str) -> u64 {
    let value = |key: &str| stat.lines().find_map(|line| line.strip_prefix(key)?.trim().parse::<u64>().ok());
    // Version 1 has the sum with the groups within apart.
    let sum = |total: &str, own: &str| value(total).or_else(|| value(own)).unwrap_or(0);
    sum("total_inactive_file ", "inactive_file ") + sum("total_active_file ", "active_file ")
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
    fn the_tightest_of_all_control_groups_counts() {
        let root = tempfile::tempdir().unwrap();
        let write = |group: &str, files: &[(&str, &str)]| {
            fs::create_dir_all(root.path().join(group)).unwrap();
            files.iter().for_each(|(name, text)| fs::write(root.path().join(group).join(name), text).unwrap());
        };
        write("a", &[("memory.max", "900\n"), ("memory.current", "300\n"), ("memory.stat", "active_file 100\n")]);
        write("a/b", &[("memory.max", "max\n"), ("memory.current", "10\n")]);
        write("memory/v1", &[("memory.limit_in_bytes", "5000"), ("memory.usage_in_bytes", "1000")]);
        let free = |text: &str| -> Vec<u64> {
            control_groups(root.path(), text).iter().filter_map(|group| free_in_group(group)).collect()
        };
        assert_eq!(free("0::/a/b\n"), [700]);
        assert_eq!(free("9:memory:/v1/gone\n3:cpuset:/\n0::/\n"), [4000]);
        assert_eq!(free("0::/elsewhere\nnonsense"), [0; 0]);
        let stat = "inactive_file 1\ntotal_inactive_file 30\ntotal_active_file 12\n";
        assert_eq!(cached_bytes(stat), 42);
    }

    #[test]
    fn this_machine_has_a_core() {
        assert!(physical_cores() >= 1);
    }
}
