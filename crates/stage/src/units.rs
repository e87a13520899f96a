//! Fixed units of work: every unit's rows are written as one shard file before the next begins, so
//! a killed run continues where it was, a job array can share the units out, and the joined bytes
//! are the same by construction. Beside each shard stands its hash: one that is damaged is made anew.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use arete_records::left_out::{self, LeftOut};
use arete_records::parquet::{self, Row};
use arete_records::{Refusal, atomic};
use serde::{Deserialize, Serialize};

use crate::Error;
use crate::seal::Seal;

/// Prompts in a unit.
pub const UNIT: usize = 32;

/// The directory of shard files inside a stage's output.
pub const SHARDS: &str = "shards";

/// One part of a job array, written `i/n`: units i, i + n, i + 2n, … of n parts, i from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Shard {
    part: usize,
    parts: usize,
}

impl Shard {
    /// Number of parts of the whole array.
    pub fn parts(self) -> usize {
        self.parts
    }

    fn owns(self, unit: usize) -> bool {
        unit % self.parts == self.part - 1
    }
}

impl FromStr for Shard {
    type Err = Refusal;

    fn from_str(text: &str) -> Result<Self, Refusal> {
        let numbers = text.split_once('/').and_then(|(part, parts)| {
            Some(Self { part: part.parse().ok()?, parts: parts.parse().ok()? })
        });
        numbers
            .filter(|shard| (1..=shard.parts).contains(&shard.part))
            .ok_or_else(|| Refusal::setting("shard", "i/n with 1 <= i <= n", text))
    }
}

impl TryFrom<String> for Shard {
    type Error = Refusal;

    fn try_from(text: String) -> Result<Self, Refusal> {
        text.parse()
    }
}

impl From<Shard> for String {
    fn from(shard: Shard) -> Self {
        shard.to_string()
    }
}

impl fmt::Display for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.part, self.parts)
    }
}

/// A stage's units, and where their shard files go.
#[derive(Debug, Clone)]
pub struct Units<'a> {
    /// The stage's output directory.
    pub output: &'a Path,
    /// Name of the rows' files, without extension.
    pub name: String,
    /// Prompts (or pairs) in all.
    pub n_items: usize,
    /// The part to do; `None` does all.
    pub shard: Option<Shard>,
}

impl Units<'_> {
    /// Number of units.
    pub fn count(&self) -> usize {
        self.n_items.div_ceil(UNIT)
    }

    /// The items of one unit.
    pub fn items(&self, unit: usize) -> Range<usize> {
        unit * UNIT..((unit + 1) * UNIT).min(self.n_items)
    }

    /// Whether this run does a unit.
    pub fn owns(&self, unit: usize) -> bool {
        self.shard.is_none_or(|shard| shard.owns(unit))
    }

    /// The units this run does that have no shard file yet, and the number of items in them.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if a file that is there cannot be read.
    pub fn missing(&self) -> Result<(Vec<usize>, usize), Error> {
        if self.joined_path().exists() && Seal::of_own(&self.joined_path())?.is_some() {
            return Ok((Vec::new(), 0));
        }
        let mut units = Vec::new();
        for unit in (0..self.count()).filter(|&unit| self.owns(unit)) {
            if Seal::of_own(&self.shard_path(unit))?.is_none() {
                units.push(unit);
            }
        }
        let n_items = units.iter().map(|&unit| self.items(unit).len()).sum();
        Ok((units, n_items))
    }

    /// Computes the missing units, one shard file each. `compute` gets a unit's items.
    ///
    /// # Errors
    ///
    /// Whatever `compute` returns, or a shard file that cannot be written.
    pub fn run<T: Row, E: From<Error>>(
        &self,
        mut compute: impl FnMut(Range<usize>) -> Result<Vec<T>, E>,
    ) -> Result<(), E> {
        for unit in self.missing()?.0 {
            let rows = compute(self.items(unit))?;
            self.write(unit, &rows)?;
        }
        Ok(())
    }

    /// Writes the shard file of one unit.
    ///
    /// # Errors
    ///
    /// A shard file that cannot be written.
    pub fn write<T: Row>(&self, unit: usize, rows: &[T]) -> Result<(), Error> {
        self.write_with(unit, rows, &[])
    }

    /// [`Units::write`], with the items of the unit that were left out.
    ///
    /// # Errors
    ///
    /// As [`Units::write`].
    pub fn write_with<T: Row>(
        &self,
        unit: usize,
        rows: &[T],
        left_out: &[LeftOut],
    ) -> Result<(), Error> {
        fs_err::create_dir_all(self.output.join(SHARDS))?;
        let path = self.shard_path(unit);
        parquet::write(&path, rows)?;
        Seal::write(&path, left_out)
    }

    /// The items left out of the units that are done.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if a file that is there cannot be read.
    pub fn left_out(&self) -> Result<Vec<LeftOut>, Error> {
        let mut left_out = Vec::new();
        for unit in 0..self.count() {
            left_out.extend(
                Seal::of(&self.shard_path(unit))?.into_iter().flat_map(|seal| seal.left_out),
            );
        }
        Ok(left_out)
    }

    /// Reads the shard file of one unit.
    ///
    /// # Errors
    ///
    /// A shard file that cannot be read, or is not as it was written.
    pub fn read<T: Row>(&self, unit: usize) -> Result<Vec<T>, Error> {
        let path = self.shard_path(unit);
        if path.exists() && Seal::of(&path)?.is_none() {
            let reason = "damaged: remove it, and the same command makes it anew".to_owned();
            return Err(Error::Shards { path, reason });
        }
        Ok(parquet::read(path)?)
    }

    /// Reads all shard files, in order.
    ///
    /// # Errors
    ///
    /// A shard file that cannot be read.
    pub fn read_all<T: Row>(&self) -> Result<Vec<T>, Error> {
        let mut rows = Vec::new();
        for unit in 0..self.count() {
            rows.extend(self.read(unit)?);
        }
        Ok(rows)
    }

    /// Joins all shard files into one and removes them; the rows.
    ///
    /// The joined file is written whole before any shard goes, and a joined file that is there
    /// already (a run killed in between) is taken as it is.
    ///
    /// # Errors
    ///
    /// [`Error::Shards`] if a unit is missing, or a file cannot be read or written.
    pub fn join<T: Row>(&self) -> Result<Vec<T>, Error> {
        self.join_with(Vec::new())
    }

    /// [`Units::join`] with rows of another origin at the end.
    ///
    /// # Errors
    ///
    /// As [`Units::join`].
    pub fn join_with<T: Row>(&self, tail: Vec<T>) -> Result<Vec<T>, Error> {
        let joined = self.joined_path();
        let rows = if Seal::of(&joined)?.is_some() {
            parquet::read(&joined)?
        } else {
            let mut rows = Vec::new();
            for unit in 0..self.count() {
                let path = self.shard_path(unit);
                if Seal::of(&path)?.is_none() {
                    let found = if path.exists() { "damaged" } else { "missing" };
                    return Err(Error::Shards {
                        path,
                        reason: format!("unit {} of {} is {found}", unit + 1, self.count()),
                    });
                }
                rows.extend(parquet::read::<T>(&path)?);
            }
            rows.extend(tail);
            let left_out = self.left_out()?;
            if !left_out.is_empty() {
                left_out::write(self.output, &left_out)?;
            }
            parquet::write(&joined, &rows)?;
            Seal::write(&joined, &[])?;
            rows
        };
        for unit in 0..self.count() {
            let path = self.shard_path(unit);
            for path in [Seal::path(&path), path] {
                if path.exists() {
                    fs_err::remove_file(path)?;
                }
            }
        }
        let dir = self.output.join(SHARDS);
        if dir.is_dir() && fs_err::read_dir(&dir)?.next().is_none() {
            fs_err::remove_dir(dir)?;
        }
        Ok(rows)
    }

    /// Takes over the shard files of the parts of a job array.
    ///
    /// # Errors
    ///
    /// [`Error::Shards`] if two parts hold the same unit or one is missing; I/O.
    pub fn adopt(&self, parts: &[PathBuf]) -> Result<(), Error> {
        if Seal::of(&self.joined_path())?.is_some() {
            return Ok(());
        }
        fs_err::create_dir_all(self.output.join(SHARDS))?;
        for unit in 0..self.count() {
            let name = self.shard_name(unit);
            let holders: Vec<PathBuf> = parts
                .iter()
                .map(|part| part.join(SHARDS).join(&name))
                .filter(|path| path.exists())
                .collect();
            match &holders[..] {
                [one] => {
                    let Some(seal) = Seal::of(one)? else {
                        let reason = "damaged: its hash is not the one it was written with";
                        return Err(Error::Shards { path: one.clone(), reason: reason.to_owned() });
                    };
                    atomic::write(self.shard_path(unit), &fs_err::read(one)?)?;
                    Seal::write(&self.shard_path(unit), &seal.left_out)?;
                }
                [] => {
                    return Err(Error::Shards {
                        path: self.output.to_owned(),
                        reason: format!("no part holds {name}: is a part of the array missing?"),
                    });
                }
                [first, second, ..] => {
                    return Err(Error::Shards {
                        path: second.clone(),
                        reason: format!("{} holds the same unit", first.display()),
                    });
                }
            }
        }
        Ok(())
    }

    /// The file of all rows.
    pub fn joined_path(&self) -> PathBuf {
        self.output.join(format!("{}.parquet", self.name))
    }

    fn shard_name(&self, unit: usize) -> String {
        format!("{}-{unit:06}.parquet", self.name)
    }

    fn shard_path(&self, unit: usize) -> PathBuf {
        self.output.join(SHARDS).join(self.shard_name(unit))
    }
}

#[cfg(test)]
mod tests {
    use arete_records::rows::PromptRow;
    use arete_records::{Message, Split};

    use super::*;

    fn row(item: usize) -> PromptRow {
        PromptRow {
            prompt_id: format!("{item:016x}"),
            split: Split::Train,
            source: "test".to_owned(),
            prompt: vec![Message::user(format!("question {item}"))],
        }
    }

    fn units<'a>(output: &'a Path, shard: Option<&str>) -> Units<'a> {
        let shard = shard.map(|shard| shard.parse().unwrap());
        Units { output, name: "prompts".to_owned(), n_items: 70, shard }
    }

    fn compute(items: Range<usize>) -> Result<Vec<PromptRow>, Error> {
        Ok(items.map(row).collect())
    }

    #[test]
    fn a_shard_is_one_of_n() {
        assert_eq!("2/3".parse::<Shard>().unwrap().to_string(), "2/3");
        for wrong in ["0/3", "4/3", "1", "a/b", "1/0"] {
            assert!(wrong.parse::<Shard>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_killed_run_continues_with_the_missing_units() {
        let dir = tempfile::tempdir().unwrap();
        let units = units(dir.path(), None);
        let mut seen = Vec::new();
        let killed = units.run::<PromptRow, Error>(|items| {
            if items.start == 32 {
                return Err(Error::Io(std::io::Error::other("killed")));
            }
            seen.push(items.clone());
            compute(items)
        });
        assert!(killed.is_err());
        assert_eq!(units.missing().unwrap(), (vec![1, 2], 38));
        assert!(units.join::<PromptRow>().unwrap_err().to_string().contains("unit 2 of 3"));
        units
            .run(|items| {
                seen.push(items.clone());
                compute(items)
            })
            .unwrap();
        assert_eq!(seen, [0..32, 32..64, 64..70]);
        let rows: Vec<PromptRow> = units.join().unwrap();
        assert_eq!(rows, (0..70).map(row).collect::<Vec<_>>());
        assert!(!dir.path().join(SHARDS).exists());
        assert_eq!(units.join::<PromptRow>().unwrap(), rows);
        assert_eq!(units.missing().unwrap(), (vec![], 0));
    }

    #[test]
    fn a_damaged_unit_is_made_anew() {
        let dir = tempfile::tempdir().unwrap();
        let units = units(dir.path(), None);
        let left_out = [LeftOut::new("0", "too long")];
        for unit in 0..units.count() {
            units.write_with(unit, &compute(units.items(unit)).unwrap(), &left_out).unwrap();
        }
        let path = units.shard_path(1);
        for file in [path.clone(), Seal::path(&path)] {
            let sound = fs_err::read(&file).unwrap();
            for at in (0..8 * sound.len()).step_by(37) {
                let mut bytes = sound.clone();
                bytes[at / 8] ^= 1 << (at % 8);
                fs_err::write(&file, bytes).unwrap();
                // A bit of the reason of an item, or the spelling of a key, changes no row.
                if file == path {
                    assert_eq!(units.missing().unwrap(), (vec![1], 32), "{at}");
                    assert!(units.join::<PromptRow>().unwrap_err().to_string().contains("damaged"));
                }
            }
            fs_err::write(&file, sound).unwrap();
        }
        let rows: Vec<PromptRow> = units.join().unwrap();
        assert_eq!(left_out::read(dir.path()).unwrap().len(), units.count());
        let joined = fs_err::read(units.joined_path()).unwrap();
        fs_err::write(units.joined_path(), &joined[..joined.len() - 1]).unwrap();
        assert_eq!(units.missing().unwrap().0, [0, 1, 2], "a damaged joined file is no result");
        units.run(compute).unwrap();
        assert_eq!(units.join::<PromptRow>().unwrap(), rows);
        assert_eq!(fs_err::read(units.joined_path()).unwrap(), joined);
    }

    #[test]
    fn parts_of_a_job_array_join_to_the_same_bytes() {
        let (whole, merged) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        units(whole.path(), None).run(compute).unwrap();
        units(whole.path(), None).join::<PromptRow>().unwrap();
        let parts: Vec<_> = ["1/2", "2/2"]
            .map(|shard| {
                let part = tempfile::tempdir().unwrap();
                units(part.path(), Some(shard)).run(compute).unwrap();
                part
            })
            .into();
        let paths: Vec<PathBuf> = parts.iter().map(|part| part.path().to_owned()).collect();
        let target = units(merged.path(), None);
        let missing = target.adopt(&paths[..1]).unwrap_err().to_string();
        assert!(missing.contains("prompts-000001"), "{missing}");
        let twice = [paths[0].clone(), paths[0].clone(), paths[1].clone()];
        assert!(target.adopt(&twice).unwrap_err().to_string().contains("same unit"));
        target.adopt(&paths).unwrap();
        target.join::<PromptRow>().unwrap();
        let bytes =
            |dir: &tempfile::TempDir| fs_err::read(dir.path().join("prompts.parquet")).unwrap();
        assert_eq!(bytes(&whole), bytes(&merged));
    }
}
