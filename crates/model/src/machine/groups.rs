//! Control groups: the smallest limit on the way from a process's groups to their roots.

use std::path::{Path, PathBuf};

/// The smallest of what `look` finds in the folders of `controller` (`cgroup`, `mountinfo`: the files of `/proc/self`); both versions
/// of control groups, which `look` is told: true for the second.
pub(super) fn smallest(
    cgroup: &str,
    mountinfo: &str,
    controller: &str,
    look: impl Fn(&Path, bool) -> Option<f64>,
) -> Option<f64> {
    let mut smallest: Option<f64> = None;
    for line in cgroup.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(group)) =
            (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        let second = controllers.is_empty();
        if !second && !controllers.split(',').any(|name| name == controller) {
            continue;
        }
        let Some((root, mount)) = mount_of(mountinfo, controller, second) else { continue };
        // In a container the group's path may be the host's, of which only the mount's own folder is there.
        let below = group.strip_prefix(root.as_str()).unwrap_or(group).trim_start_matches('/');
        let mut folder = mount.join(below);
        loop {
            smallest = [smallest, look(&folder, second)].into_iter().flatten().reduce(f64::min);
            if folder == mount || !folder.pop() {
                break;
            }
        }
    }
    smallest
}

/// Root and mount point of the hierarchy with a controller.
fn mount_of(mountinfo: &str, controller: &str, second: bool) -> Option<(String, PathBuf)> {
    mountinfo.lines().find_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let mut left = left.split(' ').skip(3);
        let (root, mount) = (left.next()?, left.next()?);
        let mut right = right.split(' ');
        let kind = right.next()?;
        let right_one = match second {
            true => kind == "cgroup2",
            false => {
                kind == "cgroup" && right.nth(1)?.split(',').any(|option| option == controller)
            }
        };
        let root = root.trim_end_matches('/');
        right_one.then(|| (root.to_owned(), PathBuf::from(mount)))
    })
}
