//! Which of the processes this one is, from the variables that its launcher set.
//!
//! Read in this order: `RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `MASTER_ADDR`, `MASTER_PORT` (torchrun, PyTorchJob, `arete launch`);
//! Slurm's of a step that `srun` started; those of OpenMPI and of PMI (MPICH, Intel MPI). What is set halfway, or says two things, is
//! refused: a run of N processes that each believe to be alone writes N times over the same files. `ARETE_RANKS=single` has a process
//! be alone whatever else is set.

use arete_records::Refusal;

/// Says `single`: no other variable counts.
pub const SINGLE: &str = "ARETE_RANKS";
/// Set by `arete launch` and read by nobody else: its variables are its own, whatever a scheduler has set around it.
pub const LAUNCHED: &str = "ARETE_LAUNCHED";

/// Ports that Slurm's job numbers are mapped to.
const FIRST_PORT: u64 = 20_000;
const N_PORTS: u64 = 20_000;

/// A process's place among those that train together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// From 0.
    pub rank: usize,
    /// How many there are.
    pub n_ranks: usize,
    /// From 0 on each machine: the GPU it takes.
    pub local_rank: usize,
    /// Where rank 0 listens; none of one process.
    pub address: Option<(String, u16)>,
}

impl Place {
    /// One process.
    pub fn alone() -> Self {
        Self { rank: 0, n_ranks: 1, local_rank: 0, address: None }
    }

    /// This process's.
    ///
    /// # Errors
    ///
    /// [`Refusal`] naming the variable that is missing, unreadable or contradicts another.
    pub fn of_this_process() -> Result<Self, Refusal> {
        Self::from(&|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
    }

    /// The place that variables describe.
    ///
    /// # Errors
    ///
    /// As [`Place::of_this_process`].
    pub fn from(variable: &dyn Fn(&str) -> Option<String>) -> Result<Self, Refusal> {
        match variable(SINGLE).as_deref() {
            None => {}
            Some("single") => return Ok(Self::alone()),
            Some(other) => return Err(Refusal::setting(SINGLE, "single, or not set", other)),
        }
        let variables = Variables(variable);
        let launcher = [variables.slurm()?, variables.mpi()?].into_iter().flatten().next();
        let place = match (variables.torchrun()?, launcher) {
            (Some(own), None) => own,
            (Some(own), Some((name, other))) => {
                // One torchrun a node under srun, one `arete launch` in a job: the inner launcher's variables are meant.
                let is_inner =
                    [LAUNCHED, "TORCHELASTIC_RUN_ID"].iter().any(|v| variable(v).is_some());
                if !is_inner && (own.rank, own.n_ranks) != (other.rank, other.n_ranks) {
                    let expected = format!(
                        "one launcher's variables: {name} has this be process {} of {}; unset RANK and WORLD_SIZE",
                        other.rank, other.n_ranks
                    );
                    let got = format!("RANK={} and WORLD_SIZE={} as well", own.rank, own.n_ranks);
                    return Err(Refusal::setting("WORLD_SIZE", expected, got));
                }
                own
            }
            (None, Some((_, other))) => other,
            (None, None) => return Ok(Self::alone()),
        };
        if place.n_ranks == 1 {
            return Ok(Self::alone());
        }
        Ok(place)
    }
}

struct Variables<'a>(&'a dyn Fn(&str) -> Option<String>);

impl Variables<'_> {
    fn has(&self, name: &str) -> bool {
        (self.0)(name).is_some()
    }

    fn number(&self, name: &str) -> Result<Option<usize>, Refusal> {
        let Some(text) = (self.0)(name) else { return Ok(None) };
        let number = text.trim().parse().map_err(|_| Refusal::setting(name, "a number", &text))?;
        Ok(Some(number))
    }

    fn needed(&self, name: &str, beside: &str) -> Result<usize, Refusal> {
        self.number(name)?
            .ok_or_else(|| Refusal::setting(name, format!("a number, beside {beside}"), "nothing"))
    }

    fn torchrun(&self) -> Result<Option<Place>, Refusal> {
        let is_any = self.has("RANK") || self.has("WORLD_SIZE");
        if !is_any {
            return Ok(None);
        }
        let rank = self.needed("RANK", "WORLD_SIZE")?;
        let n_ranks = self.needed("WORLD_SIZE", "RANK")?;
        let per_node = [self.number("NPROC_PER_NODE")?, self.number("PET_NPROC_PER_NODE")?];
        let per_node = per_node.into_iter().flatten().max().unwrap_or(1);
        if per_node > 1 && !self.has("LOCAL_RANK") {
            let expected = format!(
                "a count of processes: here it counts machines, of {per_node} processes each (NPROC_PER_NODE, and no LOCAL_RANK); \
                 start the processes with torchrun or `arete launch`"
            );
            return Err(Refusal::setting("WORLD_SIZE", expected, n_ranks));
        }
        let local_rank = match self.number("LOCAL_RANK")? {
            Some(local_rank) => local_rank,
            None => self.number("SLURM_LOCALID")?.unwrap_or(0),
        };
        if let Some(local_size) = self.number("LOCAL_WORLD_SIZE")?
            && (local_rank >= local_size || local_size > n_ranks)
        {
            let expected =
                format!("above LOCAL_RANK ({local_rank}) and at most WORLD_SIZE ({n_ranks})");
            return Err(Refusal::setting("LOCAL_WORLD_SIZE", expected, local_size));
        }
        let address = self.address(n_ranks, "WORLD_SIZE", None)?;
        checked("RANK", Place { rank, n_ranks, local_rank, address }).map(Some)
    }

    fn slurm(&self) -> Result<Option<(&'static str, Place)>, Refusal> {
        if !self.has("SLURM_STEP_ID") || !self.has("SLURM_PROCID") {
            // The script of a job has SLURM_NTASKS and a SLURM_PROCID of 0, but is one process alone.
            let n_tasks = self.number("SLURM_NTASKS")?.unwrap_or(1);
            let is_told =
                self.has("WORLD_SIZE") || self.has("OMPI_COMM_WORLD_SIZE") || self.has("PMI_SIZE");
            if n_tasks > 1 && !is_told {
                let expected = format!(
                    "a process that srun started: the job has {n_tasks} tasks, and this is none of them. Put `srun` before the \
                     command, or set {SINGLE}=single for one process"
                );
                return Err(Refusal::setting(
                    "SLURM_NTASKS",
                    expected,
                    "a process of the job's script",
                ));
            }
            return Ok(None);
        }
        let rank = self.needed("SLURM_PROCID", "SLURM_STEP_ID")?;
        let n_ranks = match self.number("SLURM_STEP_NUM_TASKS")? {
            Some(n_ranks) => n_ranks,
            None => self.needed("SLURM_NTASKS", "SLURM_STEP_ID")?,
        };
        if n_ranks == 1 {
            return Ok(None); // a step of one task may hold another launcher
        }
        let local_rank = self.needed("SLURM_LOCALID", "SLURM_STEP_ID")?;
        let nodes = (self.0)("SLURM_STEP_NODELIST").or_else(|| (self.0)("SLURM_JOB_NODELIST"));
        let own = nodes.as_deref().and_then(first_host).map(|host| {
            let job = (self.0)("SLURM_JOB_ID").and_then(|id| id.parse::<u64>().ok()).unwrap_or(0);
            let step = (self.0)("SLURM_STEP_ID").and_then(|id| id.parse::<u64>().ok()).unwrap_or(0);
            let port = FIRST_PORT + (job.wrapping_mul(61).wrapping_add(step)) % N_PORTS;
            (host, u16::try_from(port).expect("below 40000"))
        });
        let address = self.address(n_ranks, "SLURM_STEP_NUM_TASKS", own)?;
        let place = checked("SLURM_PROCID", Place { rank, n_ranks, local_rank, address })?;
        Ok(Some(("Slurm", place)))
    }

    fn mpi(&self) -> Result<Option<(&'static str, Place)>, Refusal> {
        const NAMES: [(&str, [&str; 3]); 2] = [
            (
                "OpenMPI",
                ["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"],
            ),
            ("PMI", ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"]),
        ];
        for (launcher, [rank_name, size, local]) in NAMES {
            // Slurm's own plug-in for PMI sets these beside Slurm's.
            if !self.has(size) || (launcher == "PMI" && self.has("SLURM_STEP_ID")) {
                continue;
            }
            let n_ranks = self.needed(size, rank_name)?;
            if n_ranks == 1 {
                continue;
            }
            let rank = self.needed(rank_name, size)?;
            let local_rank = self.number(local)?.unwrap_or(0);
            let address = self.address(n_ranks, size, None)?;
            let place = checked(rank_name, Place { rank, n_ranks, local_rank, address })?;
            return Ok(Some((launcher, place)));
        }
        Ok(None)
    }

    /// Where rank 0 listens: what the user says, else the launcher's `own`.
    fn address(
        &self,
        n_ranks: usize,
        beside: &str,
        own: Option<(String, u16)>,
    ) -> Result<Option<(String, u16)>, Refusal> {
        if n_ranks <= 1 {
            return Ok(None);
        }
        let (host, port) = ((self.0)("MASTER_ADDR"), self.number("MASTER_PORT")?);
        let (own_host, own_port) = own.unzip();
        let missing = |name: &str, expected: &str| {
            Refusal::setting(name, format!("{expected}, beside {beside}={n_ranks}"), "nothing")
        };
        let host = host
            .or(own_host)
            .ok_or_else(|| missing("MASTER_ADDR", "the name or address of rank 0's machine"))?;
        let port = match port {
            Some(port) => u16::try_from(port)
                .ok()
                .filter(|port| *port > 0)
                .ok_or_else(|| Refusal::setting("MASTER_PORT", "1 to 65535", port))?,
            None => {
                own_port.ok_or_else(|| missing("MASTER_PORT", "a free port of rank 0's machine"))?
            }
        };
        Ok(Some((host, port)))
    }
}

fn checked(name: &str, place: Place) -> Result<Place, Refusal> {
    if place.rank < place.n_ranks {
        return Ok(place);
    }
    Err(Refusal::setting(name, format!("below the {} processes", place.n_ranks), place.rank))
}

/// The first host of Slurm's short form: `gpu[03-07,11],login1` is gpu03 first.
fn first_host(list: &str) -> Option<String> {
    let end = list.find([',', '[']).unwrap_or(list.len());
    let stem = &list[..end];
    let host = match list[end..].strip_prefix('[') {
        Some(rest) => {
            let close = rest.find(']')?;
            let first = rest[..close].split([',', '-']).next()?;
            let tail: String = rest[close + 1..].chars().take_while(|c| *c != ',').collect();
            // Two ranges in one name (rack[1-2]node[1-4]) stay Slurm's to unfold.
            if tail.contains('[') {
                return None;
            }
            format!("{stem}{first}{tail}")
        }
        None => stem.to_owned(),
    };
    (!host.is_empty()).then_some(host)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(variables: &[(&str, &str)]) -> Result<Place, String> {
        let find = |name: &str| {
            variables.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned())
        };
        Place::from(&find).map_err(|refusal| refusal.to_string())
    }

    const TORCHRUN: [(&str, &str); 5] = [
        ("RANK", "3"),
        ("WORLD_SIZE", "4"),
        ("LOCAL_RANK", "1"),
        ("MASTER_ADDR", "a1"),
        ("MASTER_PORT", "29500"),
    ];
    const SRUN: [(&str, &str); 7] = [
        ("SLURM_JOB_ID", "4242"),
        ("SLURM_STEP_ID", "0"),
        ("SLURM_PROCID", "5"),
        ("SLURM_LOCALID", "1"),
        ("SLURM_NTASKS", "8"),
        ("SLURM_STEP_NUM_TASKS", "8"),
        ("SLURM_STEP_NODELIST", "gpu[03-04],login"),
    ];

    fn at(rank: usize, n_ranks: usize, local_rank: usize, host: &str, port: u16) -> Place {
        Place { rank, n_ranks, local_rank, address: Some((host.to_owned(), port)) }
    }

    #[test]
    fn every_launchers_variables_are_understood() {
        assert_eq!(place(&[]), Ok(Place::alone()));
        assert_eq!(place(&TORCHRUN), Ok(at(3, 4, 1, "a1", 29500)));
        // 20000 + (4242 · 61) mod 20000
        assert_eq!(place(&SRUN), Ok(at(5, 8, 1, "gpu03", 38762)));
        let own = [&SRUN[..], &[("MASTER_ADDR", "ib0"), ("MASTER_PORT", "29501")]].concat();
        assert_eq!(place(&own), Ok(at(5, 8, 1, "ib0", 29501)));
        let mpi = [
            ("OMPI_COMM_WORLD_RANK", "1"),
            ("OMPI_COMM_WORLD_SIZE", "2"),
            ("OMPI_COMM_WORLD_LOCAL_RANK", "0"),
            ("MASTER_ADDR", "b"),
            ("MASTER_PORT", "1"),
        ];
        assert_eq!(place(&mpi), Ok(at(1, 2, 0, "b", 1)));
        // torchrun, one a node, as tasks of a step.
        let inner = [&TORCHRUN[..], &SRUN, &[("TORCHELASTIC_RUN_ID", "x")]].concat();
        assert_eq!(place(&inner), Ok(at(3, 4, 1, "a1", 29500)));
        // One process is no group, whoever started it.
        assert_eq!(place(&[("RANK", "0"), ("WORLD_SIZE", "1")]), Ok(Place::alone()));
        let one = [("SLURM_STEP_ID", "0"), ("SLURM_PROCID", "0"), ("SLURM_NTASKS", "1")];
        assert_eq!(place(&one), Ok(Place::alone()));
    }

    #[test]
    fn traps_are_refused_by_name() {
        let without = |name: &str| -> Vec<(&str, &str)> {
            TORCHRUN.into_iter().filter(|(n, _)| *n != name).collect()
        };
        let with = |more: &[(&'static str, &'static str)]| [more, &TORCHRUN[..]].concat();
        for (variables, message) in [
            (
                without("MASTER_ADDR"),
                "MASTER_ADDR: expected the name or address of rank 0's machine, beside WORLD_SIZE=4, got nothing",
            ),
            (without("MASTER_PORT"), "MASTER_PORT: expected a free port"),
            (without("RANK"), "RANK: expected a number, beside WORLD_SIZE, got nothing"),
            (without("WORLD_SIZE"), "WORLD_SIZE: expected a number, beside RANK, got nothing"),
            (with(&[("RANK", "4")]), "RANK: expected below the 4 processes, got 4"),
            (with(&[("RANK", "x")]), "RANK: expected a number, got x"),
            (with(&[("MASTER_PORT", "0")]), "MASTER_PORT: expected 1 to 65535, got 0"),
            (with(&[("LOCAL_WORLD_SIZE", "1")]), "LOCAL_WORLD_SIZE: expected above LOCAL_RANK (1)"),
            // Operators that count machines.
            ([&without("LOCAL_RANK")[..], &[("NPROC_PER_NODE", "8")]].concat(), "counts machines"),
            // A job's script without srun.
            (
                vec![("SLURM_NTASKS", "4"), ("SLURM_PROCID", "0"), ("SLURM_JOB_ID", "1")],
                "SLURM_NTASKS: expected a process that srun started",
            ),
            // RANK exported by hand in the script: every task would be rank 3.
            (
                [&TORCHRUN[..], &SRUN].concat(),
                "one launcher's variables: Slurm has this be process 5 of 8",
            ),
            (vec![("OMPI_COMM_WORLD_RANK", "0"), ("OMPI_COMM_WORLD_SIZE", "2")], "MASTER_ADDR"),
            (vec![(SINGLE, "yes")], "ARETE_RANKS: expected single, or not set, got yes"),
        ] {
            let refused = place(&variables).unwrap_err();
            assert!(refused.contains(message), "{refused}");
        }
        let single = [&[(SINGLE, "single")], &[("SLURM_NTASKS", "4")][..]].concat();
        assert_eq!(place(&single), Ok(Place::alone()));
    }

    #[test]
    fn slurms_short_form_of_host_names() {
        for (list, first) in [
            ("node1", Some("node1")),
            ("node1,node2", Some("node1")),
            ("gpu[03-07,11],x", Some("gpu03")),
            ("n[7]", Some("n7")),
            ("n[1-2]-ib,x[3]", Some("n1-ib")),
            ("r[1-2]n[1-4]", None),
            ("", None),
        ] {
            assert_eq!(first_host(list).as_deref(), first, "{list}");
        }
    }
}
