//! Cores of the machine, and those that affinity and control groups leave to this process.

use std::path::Path;

use serde::Serialize;

use super::allowed_cores;
use super::groups::smallest;

/// Numbers of cores.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Cores {
    /// Of the machine, as far as this system shows it.
    pub online: Option<usize>,
    /// Those the process may run on (its affinity).
    pub affinity: Option<usize>,
    /// Cores' worth of time that the control groups allow, where they limit it.
    pub quota: Option<f64>,
    /// What is used unless a number of threads is asked for: affinity and quota together, at least 1.
    pub allowed: usize,
}

impl Cores {
    pub(super) fn look() -> Self {
        let read = |path: &str| fs_err::read_to_string(path).unwrap_or_default();
        let status = read("/proc/self/status");
        let affinity = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
        Self {
            online: count_of_list(&read("/sys/devices/system/cpu/online")),
            affinity: affinity.and_then(count_of_list),
            quota: quota(&read("/proc/self/cgroup"), &read("/proc/self/mountinfo"), |path| {
                fs_err::read_to_string(path).ok()
            }),
            allowed: allowed_cores(),
        }
    }
}

/// Numbers in a list of the kernel's (`0-3,8`).
fn count_of_list(list: &str) -> Option<usize> {
    let count = |part: &str| match part.split_once('-') {
        Some((first, last)) => {
            Some(last.parse::<usize>().ok()?.checked_sub(first.parse().ok()?)? + 1)
        }
        None => part.parse::<usize>().ok().map(|_| 1),
    };
    list.trim().split(',').map(count).sum()
}

/// The smallest quota on the way from the process's control groups (`cgroup`, `mountinfo`: the files of `/proc/self`) to their
/// roots, in cores; both versions of control groups.
fn quota(cgroup: &str, mountinfo: &str, read: impl Fn(&Path) -> Option<String>) -> Option<f64> {
    smallest(cgroup, mountinfo, "cpu", |folder, second| match second {
        true => read(&folder.join("cpu.max")).and_then(|text| ratio_of_max(&text)),
        false => ratio_of_files(folder, &read),
    })
}

/// `cpu.max`: "quota period" or "max period", in microseconds.
fn ratio_of_max(text: &str) -> Option<f64> {
    let (quota, period) = text.trim().split_once(' ')?;
    Some(quota.parse::<f64>().ok()? / period.parse::<f64>().ok().filter(|period| *period > 0.0)?)
}

/// `cpu.cfs_quota_us` (-1: none) and `cpu.cfs_period_us`.
fn ratio_of_files(folder: &Path, read: &impl Fn(&Path) -> Option<String>) -> Option<f64> {
    let number = |name: &str| read(&folder.join(name))?.trim().parse::<f64>().ok();
    let (quota, period) = (number("cpu.cfs_quota_us")?, number("cpu.cfs_period_us")?);
    (quota > 0.0 && period > 0.0).then(|| quota / period)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(cgroup: &str, mountinfo: &str, files: &[(&str, &str)]) -> Option<f64> {
        quota(cgroup, mountinfo, |path| {
            let text = files.iter().find(|(name, _)| Path::new(name) == path);
            text.map(|(_, text)| (*text).to_owned())
        })
    }

    const V2: &str = "30 24 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n";
    const V1: &str = "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n\
                      33 31 0:30 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n";

    #[test]
    fn the_second_version_takes_the_smallest_quota_on_the_way() {
        let files = [
            ("/sys/fs/cgroup/a/b/cpu.max", "max 100000\n"),
            ("/sys/fs/cgroup/a/cpu.max", "150000 100000\n"),
        ];
        assert_eq!(found("0::/a/b\n", V2, &files), Some(1.5));
        assert_eq!(found("0::/a/b\n", V2, &files[..1]), None);
        // In a container that sees its own group as the root.
        assert_eq!(found("0::/\n", V2, &[("/sys/fs/cgroup/cpu.max", "50000 100000")]), Some(0.5));
    }

    #[test]
    fn the_first_version_reads_two_files() {
        let folder = "/sys/fs/cgroup/cpu/job";
        let files = [
            (format!("{folder}/cpu.cfs_quota_us"), "100000\n"),
            (format!("{folder}/cpu.cfs_period_us"), "100000\n"),
            ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us".to_owned(), "-1\n"),
            ("/sys/fs/cgroup/cpu/cpu.cfs_period_us".to_owned(), "100000\n"),
        ];
        let files: Vec<(&str, &str)> = files.iter().map(|(a, b)| (a.as_str(), *b)).collect();
        let groups = "3:cpuset:/other\n2:cpu,cpuacct:/job\n0::/\n";
        assert_eq!(found(groups, V1, &files), Some(1.0));
        assert_eq!(found("2:cpu,cpuacct:/\n", V1, &files), None);
    }

    /// Docker without a namespace of control groups: the path is the host's, the mount shows the group alone.
    #[test]
    fn a_container_may_see_the_hosts_path() {
        let mounts = "32 31 0:29 /docker/x /sys/fs/cgroup/cpu ro - cgroup cgroup rw,cpu\n";
        let files = [
            ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "200000"),
            ("/sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000"),
        ];
        assert_eq!(found("2:cpu:/docker/x\n", mounts, &files), Some(2.0));
    }

    #[test]
    fn lists_are_counted() {
        assert_eq!(count_of_list("0-3,8\n"), Some(5));
        assert_eq!(count_of_list("0"), Some(1));
        assert_eq!(count_of_list(""), None);
    }

    #[test]
    fn no_more_is_allowed_than_affinity_and_quota_give() {
        let cores = Cores::look();
        if let Some(affinity) = cores.affinity {
            assert!(cores.allowed <= affinity, "{cores:?}");
        }
        if let Some(quota) = cores.quota {
            assert!(cores.allowed as f64 <= quota.max(1.0), "{cores:?}");
        }
    }
}
