//! Whether there is room for a stage: what it needs against what the device has, asked before anything is loaded.

use arete_model::machine::Memory;
use arete_model::{Device, Error, Source, cuda, machine};

use super::{Demand, PROMPT_TOKENS, Settings, Shape};

/// Set (to anything but `0`), a stage starts although its plan does not fit.
pub const IGNORE: &str = "ARETE_IGNORE_ROOM";

/// Memory of the device that a stage computes on.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    /// What there is in all: a stage that needs more is refused.
    pub total: Option<u64>,
    /// What is free now.
    pub free: Option<u64>,
}

/// How a stage starts that is not refused.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Start {
    /// Keeps less for the backward pass than its settings say: nothing but blocks' inputs, and no graph of a first pass.
    pub saving: bool,
    /// The sentence that says so, or that memory is short.
    pub remark: Option<String>,
}

impl Room {
    /// Of a device: what is free on a GPU, what this machine has.
    pub fn of(device: Device) -> Self {
        match device {
            Device::Cuda(index) => {
                let free = cuda::memory(index).map(|(free, _)| free);
                Self { total: free, free }
            }
            _ => {
                let Memory { total, free } = Memory::look();
                Self { total, free }
            }
        }
    }

    /// Whether a stage has room here, and how it starts.
    ///
    /// # Errors
    ///
    /// [`Error::NoRoom`]: what it needs, what there is, and which settings would make it fit.
    pub fn ask(self, stage: &str, shape: &Shape, demand: &Demand) -> Result<Start, Error> {
        let (phase, bytes) = shape.need(demand).peak();
        let (Some(total), Some(free)) = (self.total, self.free) else {
            return Ok(Start::default());
        };
        if bytes <= free {
            return Ok(Start::default());
        }
        // What changes no byte is done without asking.
        let saved = Settings { recompute: true, keep_graph_tokens: 0, ..demand.settings.clone() };
        let least = shape.need_with(demand.role, &saved).peak().1;
        let saving = demand.keys.contains(&"recompute") && least < bytes;
        let (whose, there) = match shape.is_on_cpu() {
            true => ("memory", "this machine has"),
            false => ("the GPU's memory", "free are"),
        };
        let needs = format!("{stage}: needs {} of {whose} ({phase}), ", gb(bytes));
        if saving && least <= total {
            let remark = format!(
                "{needs}free are {}: blocks run again in the backward pass, which takes {} and changes no byte on a CPU",
                gb(free),
                gb(least)
            );
            return Ok(Start { saving, remark: Some(remark) });
        }
        if bytes <= total {
            return Ok(Start {
                saving: false,
                remark: Some(format!("{needs}free are {}", gb(free))),
            });
        }
        let remedy = match shape.fitting(demand, total) {
            Ok(changes) => format!("it fits with {} under [{stage}]", changes.join(", ")),
            Err(least) => format!("with everything that saves memory it needs {}", gb(least)),
        };
        Err(Error::NoRoom { what: format!("{needs}{there} {}: {remedy}", gb(total)) })
    }
}

/// What a stage's own program asks before it loads a model that is here: whether it has to save memory ([`Start::saving`]), which is
/// logged.
///
/// # Errors
///
/// [`Error::NoRoom`], unless [`IGNORE`] is set; a model that is none.
pub fn admit(stage: &str, model: &Source, device: Device, demand: &Demand) -> Result<bool, Error> {
    let Some(model) = model.local_path() else { return Ok(false) };
    let device_name = machine::device_name(device);
    let shape = Shape::of(&model.to_string_lossy(), Some(&device_name), PROMPT_TOKENS)?;
    match Room::of(device).ask(stage, &shape, demand) {
        Ok(Start { saving, remark }) => {
            remark.iter().for_each(|remark| tracing::warn!("{remark}"));
            Ok(saving)
        }
        Err(error) if std::env::var_os(IGNORE).is_some_and(|value| value != "0") => {
            tracing::warn!("{error}");
            Ok(false)
        }
        Err(Error::NoRoom { what }) => {
            Err(Error::NoRoom { what: format!("{what}; {IGNORE}=1 runs anyway") })
        }
        Err(error) => Err(error),
    }
}

fn gb(bytes: u64) -> String {
    format!("{:.1} GB", bytes as f64 / 1e9)
}

#[cfg(test)]
mod tests {
    use arete_model::Target;
    use arete_model::machine::Dtype;

    use super::super::Role;
    use super::*;

    fn sft(device: &str) -> (Shape, Demand) {
        let config = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../model/tests/goldens/config/mistral_7b_instruct_v0.2.json"
        );
        let settings = Settings {
            rank: 16,
            targets: Target::ALL.to_vec(),
            micro_batch_tokens: 4096,
            max_length: 1024,
            batch_size: 16,
            ..Settings::new(Dtype::Bf16, false)
        };
        let keys = &["recompute", "nf4", "micro_batch_tokens"];
        (Shape::of(config, Some(device), 128).unwrap(), Demand { role: Role::Sft, settings, keys })
    }

    #[test]
    fn a_stage_starts_saves_or_is_refused_in_one_sentence() {
        for (device, whose, there) in
            [("cpu", "memory", "this machine has"), ("cuda", "the GPU's memory", "free are")]
        {
            let (shape, demand) = sft(device);
            let need = shape.need(&demand).peak().1;
            let ask = |total, free| {
                Room { total: Some(total), free: Some(free) }.ask("sft", &shape, &demand)
            };
            assert_eq!(ask(need, need).unwrap(), Start::default());
            let saved = Settings { recompute: true, ..demand.settings.clone() };
            let least = shape.need_with(Role::Sft, &saved).peak().1;
            assert!(least < need, "{least} {need}");
            let start = ask(need - 1, need - 1).unwrap();
            let remark = start.remark.unwrap();
            assert!(start.saving && remark.contains("blocks run again"), "{remark}");
            assert!(
                remark.starts_with(&format!("sft: needs {} of {whose} (", gb(need))),
                "{remark}"
            );
            let refused = ask(least - 1, least - 1).unwrap_err();
            assert!(matches!(refused, Error::NoRoom { .. }));
            let message = refused.to_string();
            let parts = [there, "it fits with recompute = true, nf4 = true under [sft]"];
            assert!(parts.iter().all(|part| message.contains(part)), "{message}");
            let message = ask(1 << 30, 1 << 30).unwrap_err().to_string();
            assert!(message.contains("with everything that saves memory it needs"), "{message}");
        }
    }

    #[test]
    fn without_figures_nothing_is_refused() {
        let (shape, demand) = sft("cpu");
        let room = Room { total: None, free: None };
        assert_eq!(room.ask("sft", &shape, &demand).unwrap(), Start::default());
    }

    /// Memory that others hold now may be free by then: short of free memory alone, a stage that has nothing to save starts.
    #[test]
    fn a_short_of_free_memory_is_said_and_no_more() {
        let (shape, demand) = sft("cpu");
        let demand = Demand { keys: &["nf4"], ..demand };
        let need = shape.need(&demand).peak().1;
        let start = Room { total: Some(need), free: Some(need / 2) }.ask("sft", &shape, &demand);
        let Start { saving, remark } = start.unwrap();
        assert!(!saving && remark.unwrap().ends_with(&format!("free are {}", gb(need / 2))));
    }
}
