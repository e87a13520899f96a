use super::*;
use proptest::prelude::*;

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs_err::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

#[test]
fn write_replaces_and_leaves_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.txt");
    write(&path, b"one").unwrap();
    write(&path, b"two").unwrap();
    assert_eq!(fs_err::read(&path).unwrap(), b"two");
    assert_eq!(names(dir.path()), ["a.txt"]);
}

#[test]
fn a_write_that_fails_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("taken");
    fs_err::create_dir(&target).unwrap();
    fs_err::write(target.join("inside"), b"kept").unwrap();
    // A file cannot replace a directory: the rename fails after the temporary file is written.
    let error = write(&target, b"bytes").unwrap_err();
    assert!(error.is_io() && error.to_string().contains("taken"), "{error}");
    assert_eq!(names(dir.path()), ["taken"]);
    assert!(write(dir.path().join("no/such/dir"), b"").is_err());
    assert!(write(dir.path().join(".."), b"").is_err());
    assert_eq!(names(dir.path()), ["taken"]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn what_was_written_is_read(bytes in proptest::collection::vec(any::<u8>(), 0..4096)) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        write(&path, &bytes).unwrap();
        prop_assert_eq!(fs_err::read(&path).unwrap(), bytes);
        prop_assert_eq!(names(dir.path()), ["x"]);
    }
}

#[test]
fn a_directory_appears_whole_and_replaces_the_old_one() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("new/model");
    let first = AtomicDir::new(&target).unwrap();
    fs_err::write(first.path().join("old.txt"), b"1").unwrap();
    assert!(!target.exists());
    first.commit().unwrap();
    let second = AtomicDir::new(&target).unwrap();
    fs_err::create_dir(second.path().join("sub")).unwrap();
    fs_err::write(second.path().join("sub/new.txt"), b"2").unwrap();
    fs_err::write(second.path().join("old.txt"), b"2").unwrap();
    second.commit().unwrap();
    assert_eq!(names(&target), ["old.txt", "sub"]);
    assert_eq!(fs_err::read(target.join("old.txt")).unwrap(), b"2");
    assert_eq!(names(&dir.path().join("new")), ["model"]);
}

fn replaced_by(target: &Path, files: &[(&str, &[u8])]) -> AtomicDir {
    let fresh = AtomicDir::new(target).unwrap();
    for (name, bytes) in files {
        fs_err::write(fresh.path().join(name), bytes).unwrap();
    }
    fresh
}

#[test]
fn nothing_is_removed_that_has_another_name() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("model");
    fs_err::create_dir_all(target.join("sub")).unwrap();
    fs_err::write(target.join("sub/thesis.txt"), b"thesis").unwrap();
    fs_err::write(target.join("weights"), b"1").unwrap();
    replaced_by(&target, &[("weights", b"2")]).commit().unwrap();
    assert_eq!(names(dir.path()), ["model", "model.old-1"]);
    assert_eq!(names(&target), ["weights"]);
    let kept = dir.path().join("model.old-1");
    assert_eq!(fs_err::read(kept.join("sub/thesis.txt")).unwrap(), b"thesis");
    assert_eq!(fs_err::read(kept.join("weights")).unwrap(), b"1");
}

#[test]
fn what_stands_under_a_users_name_is_set_aside_whole() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("out");
    let outside = dir.path().join("docs");
    fs_err::create_dir(&outside).unwrap();
    fs_err::write(outside.join("thesis.txt"), b"thesis").unwrap();
    // A directory, a file, a link to a directory, an empty directory.
    let aside = |n: usize| Some(dir.path().join(format!("out.old-{n}")));
    fs_err::create_dir(&target).unwrap();
    fs_err::write(target.join("weights"), b"mine").unwrap();
    assert_eq!(replaced_by(&target, &[("weights", b"1")]).commit_beside().unwrap(), aside(1));
    assert_eq!(fs_err::read(dir.path().join("out.old-1/weights")).unwrap(), b"mine");
    // The same again: nothing to do.
    assert_eq!(replaced_by(&target, &[("weights", b"1")]).commit_beside().unwrap(), None);
    // Another, or the same with one more beside it.
    assert_eq!(replaced_by(&target, &[("weights", b"2")]).commit_beside().unwrap(), aside(2));
    fs_err::write(target.join("notes"), b"mine").unwrap();
    assert_eq!(replaced_by(&target, &[("weights", b"2")]).commit_beside().unwrap(), aside(3));
    fs_err::remove_dir_all(&target).unwrap();
    fs_err::write(&target, b"a file").unwrap();
    assert_eq!(replaced_by(&target, &[("weights", b"2")]).commit_beside().unwrap(), aside(4));
    assert_eq!(fs_err::read(dir.path().join("out.old-4")).unwrap(), b"a file");
    fs_err::remove_dir_all(&target).unwrap();
    fs_err::os::unix::fs::symlink(&outside, &target).unwrap();
    assert_eq!(replaced_by(&target, &[("weights", b"2")]).commit_beside().unwrap(), aside(5));
    assert_eq!(names(&outside), ["thesis.txt"]);
    assert!(!fs_err::symlink_metadata(&target).unwrap().is_symlink());
    fs_err::remove_dir_all(&target).unwrap();
    fs_err::create_dir(&target).unwrap();
    assert_eq!(replaced_by(&target, &[("weights", b"2")]).commit_beside().unwrap(), None);
    assert_eq!(names(&target), ["weights"]);
    let hidden = names(dir.path()).into_iter().filter(|name| name.starts_with('.'));
    assert_eq!(hidden.count(), 0);
}

#[test]
fn a_name_never_goes_without_its_directory() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("model");
    replaced_by(&target, &[("weights", b"0")]).commit().unwrap();
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let mut n_looks = 0u64;
            while !done.load(Ordering::Relaxed) {
                assert!(target.join("weights").exists(), "after {n_looks} looks");
                n_looks += 1;
            }
        });
        for round in 0..200u32 {
            let bytes = round.to_le_bytes();
            let fresh = replaced_by(&target, &[("weights", &bytes)]);
            if round % 2 == 0 { fresh.commit() } else { fresh.commit_beside().map(drop) }.unwrap();
        }
        done.store(true, Ordering::Relaxed);
        watcher.join().unwrap();
    });
}

#[test]
fn leftovers_of_the_dead_are_swept_and_those_of_the_living_are_not() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("model");
    let living = AtomicDir::new(&target).unwrap();
    fs_err::write(living.path().join("half"), b"1").unwrap();
    fs_err::create_dir(dir.path().join(".model.tmp-4711-1")).unwrap();
    fs_err::create_dir(dir.path().join(".other.tmp-4711-1")).unwrap();
    sweep_beside(&target).unwrap();
    assert!(living.path().join("half").exists());
    drop(living);
    sweep_beside(&target).unwrap();
    assert_eq!(names(dir.path()), [".other.tmp-4711-1"]);
    // Files, too, also hidden ones; a link of such a name is not ours.
    fs_err::write(dir.path().join("..hashes.json.tmp-4711-1"), b"").unwrap();
    fs_err::os::unix::fs::symlink("..", dir.path().join("..hashes.json.tmp-4711-2")).unwrap();
    sweep_beside(&dir.path().join(".hashes.json")).unwrap();
    assert_eq!(names(dir.path()), ["..hashes.json.tmp-4711-2", ".other.tmp-4711-1"]);
}

#[test]
fn sweep_gives_back_what_was_to_be_kept() {
    let dir = tempfile::tempdir().unwrap();
    // Killed between and after the two steps of a file system that cannot exchange names.
    fs_err::create_dir(dir.path().join(".a.keep-4711-1")).unwrap();
    fs_err::create_dir(dir.path().join("b")).unwrap();
    fs_err::create_dir(dir.path().join(".b.keep-4711-2")).unwrap();
    fs_err::write(dir.path().join(".b.keep-4711-2/thesis"), b"t").unwrap();
    sweep(dir.path()).unwrap();
    assert_eq!(names(dir.path()), ["a", "b", "b.old-1"]);
    assert_eq!(fs_err::read(dir.path().join("b.old-1/thesis")).unwrap(), b"t");
}

#[test]
fn a_dropped_directory_is_gone_and_the_old_one_stays() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("model");
    fs_err::create_dir(&target).unwrap();
    let fresh = AtomicDir::new(&target).unwrap();
    fs_err::write(fresh.path().join("half.txt"), b"1").unwrap();
    drop(fresh);
    assert_eq!(names(dir.path()), ["model"]);
}

#[test]
fn sweep_removes_what_killed_writers_left_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let sub = dir.path().join("sub");
    fs_err::create_dir(&sub).unwrap();
    fs_err::write(sub.join(".a.parquet.tmp-4711-0"), b"").unwrap();
    fs_err::create_dir(sub.join(".merged.tmp-4711-1")).unwrap();
    fs_err::write(sub.join(".merged.tmp-4711-1/x"), b"").unwrap();
    let kept = [".a.tmp", ".a.tmp-", ".a.tmp-1", ".a.tmp-1-x", "a.tmp-1-2", ".tmp-1-2"];
    for name in kept {
        fs_err::write(sub.join(name), b"").unwrap();
    }
    sweep(dir.path()).unwrap();
    let mut expected = kept.map(str::to_owned).to_vec();
    expected.sort();
    assert_eq!(names(&sub), expected);
}

#[test]
fn sweep_puts_back_a_directory_whose_replacement_never_came() {
    let dir = tempfile::tempdir().unwrap();
    // Killed between the two renames of `commit`.
    fs_err::create_dir(dir.path().join(".model.old-4711-1")).unwrap();
    fs_err::write(dir.path().join(".model.old-4711-1/weights"), b"w").unwrap();
    fs_err::create_dir(dir.path().join(".model.tmp-4711-0")).unwrap();
    // Killed after both, before the old one was deleted.
    fs_err::create_dir(dir.path().join("other")).unwrap();
    fs_err::create_dir(dir.path().join(".other.old-4711-3")).unwrap();
    sweep(dir.path()).unwrap();
    assert_eq!(names(dir.path()), ["model", "other"]);
    assert_eq!(fs_err::read(dir.path().join("model/weights")).unwrap(), b"w");
}

/// CIFS, sshfs and some of FUSE answer EINVAL when a directory is to be flushed; a disk that fails answers EIO.
#[test]
fn what_a_file_system_does_not_know_is_told_from_what_fails() {
    for (code, unknown) in [(22, true), (95, true), (38, true), (5, false), (28, false)] {
        let error = std::io::Error::from_raw_os_error(code);
        assert_eq!(is_unknown_call(&error), unknown, "{code}");
    }
}
