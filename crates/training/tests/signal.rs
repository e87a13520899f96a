//! SIGTERM: a full checkpoint, then an error that becomes exit code 143. A process has one set of signal flags, so this
//! test is alone in its file.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail by panicking")]

use std::ops::Range;

use arete_records::{Class, Classified};
use arete_stage::interrupt;
use arete_training::order::Plan;
use arete_training::{
    AdamW, AdamWConfig, CheckpointStore, Error, Evaluation, LoopConfig, Objective, Passes, Ranks,
    Reduce, Schedule, ScheduleKind, Select, ShardArgs, StepReport, TrainerState, train,
};
use tch::{Kind, Tensor};

struct SignalsItself {
    weight: Tensor,
    n_steps: u64,
}

impl Objective for SignalsItself {
    fn accumulate(&mut self, _: &[usize], _: &[usize], _: f64) -> Result<Vec<f64>, Error> {
        self.n_steps += 1;
        if self.n_steps == 3 {
            signal_hook::low_level::raise(signal_hook::consts::SIGTERM).unwrap();
        }
        let loss = self.weight.square().sum(Kind::Float);
        loss.backward();
        Ok(vec![f64::try_from(loss).unwrap()])
    }

    fn passes(&self) -> Passes {
        Passes::new(1, false)
    }

    fn report(&self, _: &[usize], shards: &[Vec<f64>]) -> StepReport {
        StepReport { loss: shards.concat().iter().sum(), ..StepReport::default() }
    }

    fn n_validation(&self) -> usize {
        0
    }

    fn measure(&mut self, _: Range<usize>) -> Result<Vec<f64>, Error> {
        unreachable!("there is nothing to measure")
    }

    fn evaluation(&mut self, _: &[Vec<f64>]) -> Result<Evaluation, Error> {
        unreachable!("nothing was measured")
    }
}

#[test]
fn a_signal_leaves_a_checkpoint_of_the_step_it_came_in() {
    interrupt::install().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let weight = Tensor::from_slice(&[1.0f32]).set_requires_grad(true);
    let parameters = vec![("w".to_owned(), weight.shallow_clone())];
    let mut optimiser = AdamW::new(parameters, AdamWConfig::default()).unwrap();
    let plan = Plan { n_examples: 10, batch_size: 1, epochs: 1, max_steps: None, seed: 0 };
    let config = LoopConfig {
        schedule: Schedule::new(ScheduleKind::Constant, 0.1, 0.0, 10).unwrap(),
        max_grad_norm: None,
        eval_every: 0,
        checkpoint_every: 0,
        keep_checkpoints: 1,
        select: Select::Last,
        shards: ShardArgs { virtual_shards: 2, reduce: Reduce::Ordered },
        dtype: "f32",
        scale_loss: false,
    };
    let mut objective = SignalsItself { weight, n_steps: 0 };
    let error =
        train(&Ranks::alone(), &mut objective, &mut optimiser, &plan, &config, dir.path(), "f")
            .unwrap_err();
    assert_eq!(error.class(), Some(Class::Signal(15)));
    assert_eq!(objective.n_steps, 3);
    let store = CheckpointStore::new(dir.path(), "f", "f32", 1);
    let state = store.latest::<TrainerState>().unwrap().unwrap().state;
    assert_eq!(state.global_step, 3);
}
