//! Memory of the machine, and what control groups leave of it to this process.

use std::path::Path;

use super::groups::smallest;

/// Bytes, where the system tells them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// What this process and those of its control groups may have in all.
    pub total: Option<u64>,
    /// What is free of it now.
    pub free: Option<u64>,
}

impl Memory {
    /// Of this machine, for this process.
    pub fn look() -> Self {
        let read = |path: &str| fs_err::read_to_string(path).unwrap_or_default();
        Self::of(
            &read("/proc/meminfo"),
            &read("/proc/self/cgroup"),
            &read("/proc/self/mountinfo"),
            |path| fs_err::read_to_string(path).ok(),
        )
    }

    fn of(
        meminfo: &str,
        cgroup: &str,
        mountinfo: &str,
        read: impl Fn(&Path) -> Option<String>,
    ) -> Self {
        let figure = |name: &str| -> Option<u64> {
            let line = meminfo.lines().find(|line| line.starts_with(name))?;
            line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib << 10)
        };
        let limit = smallest(cgroup, mountinfo, "memory", |folder, second| {
            let file = if second { "memory.max" } else { "memory.limit_in_bytes" };
            read(&folder.join(file))?.trim().parse().ok() // not a number: max
        });
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "limits are whole numbers of bytes, and below 2^53 where they matter"
        )]
        let limit = limit.map(|limit| limit as u64);
        let capped = |bytes: Option<u64>| [bytes, limit].into_iter().flatten().min();
        Self { total: capped(figure("MemTotal:")), free: capped(figure("MemAvailable:")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMINFO: &str =
        "MemTotal:       16384 kB\nMemFree:         1024 kB\nMemAvailable:    8192 kB\n";

    fn found(cgroup: &str, mountinfo: &str, files: &[(&str, &str)]) -> [Option<u64>; 2] {
        let Memory { total, free } = Memory::of(MEMINFO, cgroup, mountinfo, |path| {
            let text = files.iter().find(|(name, _)| Path::new(name) == path);
            text.map(|(_, text)| (*text).to_owned())
        });
        [total, free].map(|bytes| bytes.map(|bytes| bytes >> 20))
    }

    #[test]
    fn the_smallest_limit_on_the_way_counts() {
        let v2 = "30 24 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(found("0::/a/b\n", v2, &[]), [Some(16), Some(8)]);
        let max = ("/sys/fs/cgroup/a/b/memory.max", "max\n");
        let less = ("/sys/fs/cgroup/a/memory.max", "4194304\n");
        assert_eq!(found("0::/a/b\n", v2, &[max, less]), [Some(4), Some(4)]);
        let v1 = "32 31 0:29 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n";
        let unlimited = ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
        let less = ("/sys/fs/cgroup/memory/job/memory.limit_in_bytes", "12582912\n");
        let groups = "9:memory:/job\n0::/\n";
        assert_eq!(found(groups, v1, &[unlimited, less]), [Some(12), Some(8)]);
        assert_eq!(found(groups, v1, &[unlimited]), [Some(16), Some(8)]);
    }

    #[test]
    fn this_machine_has_some() {
        let Memory { total, free } = Memory::look();
        assert!(free.unwrap() > 0 && free <= total);
    }
}
