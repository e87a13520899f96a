//! The step loop: interrupted anywhere, it ends with the same bytes.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail by panicking")]

use std::ops::Range;
use std::path::Path;

use arete_training::order::Plan;
use arete_training::{
    AdamW, AdamWConfig, CheckpointStore, Error, Evaluation, LoopConfig, Objective, Outcome, Passes,
    Ranks, Reduce, Schedule, ScheduleKind, Select, ShardArgs, StepReport, TrainerState, train,
};
use tch::{Kind, Tensor};

/// Least squares over made-up points; dies before a given step.
struct LeastSquares {
    weight: Tensor,
    points: Tensor,
    targets: Tensor,
    steps_left: u64,
    bad_at: Option<usize>,
    /// Loss scales above this make the gradients infinite.
    overflow_above: f64,
}

impl LeastSquares {
    fn new() -> Self {
        let points =
            (Tensor::arange(40, (Kind::Float, tch::Device::Cpu)) * 0.37).sin().view([10, 4]);
        let truth = Tensor::from_slice(&[1.0f32, -2.0, 0.5, 3.0]);
        Self {
            weight: Tensor::zeros([4], (Kind::Float, tch::Device::Cpu)).set_requires_grad(true),
            targets: points.mv(&truth),
            points,
            steps_left: u64::MAX,
            bad_at: None,
            overflow_above: f64::INFINITY,
        }
    }

    /// The sum over points.
    fn loss(&self, rows: &[i64]) -> Tensor {
        let rows = Tensor::from_slice(rows);
        let points = self.points.index_select(0, &rows);
        let targets = self.targets.index_select(0, &rows);
        (points.mv(&self.weight) - targets).square().sum(Kind::Float)
    }
}

#[derive(Debug)]
struct Died;

impl Objective for LeastSquares {
    fn accumulate(
        &mut self,
        shard: &[usize],
        step: &[usize],
        loss_scale: f64,
    ) -> Result<Vec<f64>, Error> {
        if shard.first() == step.first() {
            if self.steps_left == 0 {
                return Err(Error::Io(std::io::Error::other(format!("{Died:?}"))));
            }
            self.steps_left -= 1;
        }
        let rows: Vec<i64> = shard.iter().map(|&idx| idx as i64).collect();
        let mut loss = self.loss(&rows);
        if self.bad_at.is_some_and(|bad| shard.contains(&bad)) {
            loss *= f64::NAN;
        }
        let overflow = if loss_scale > self.overflow_above { f64::INFINITY } else { 1.0 };
        (&loss * (loss_scale * overflow / step.len() as f64)).backward();
        Ok(vec![f64::try_from(loss).unwrap()])
    }

    fn passes(&self) -> Passes {
        Passes::new(1, false)
    }

    fn report(&self, step: &[usize], shards: &[Vec<f64>]) -> StepReport {
        let loss = shards.concat().iter().sum::<f64>() / step.len() as f64;
        StepReport { loss, n_tokens: 3, metrics: vec![("twice", 2.0 * loss)] }
    }

    fn n_validation(&self) -> usize {
        10
    }

    fn measure(&mut self, examples: Range<usize>) -> Result<Vec<f64>, Error> {
        let _guard = tch::no_grad_guard();
        let rows: Vec<i64> = examples.map(|idx| idx as i64).collect();
        Ok(vec![f64::try_from(self.loss(&rows)).unwrap()])
    }

    fn evaluation(&mut self, parts: &[Vec<f64>]) -> Result<Evaluation, Error> {
        let loss = parts.concat().iter().sum::<f64>() / 10.0;
        Ok(Evaluation { loss, metrics: vec![("half", 0.5 * loss)] })
    }
}

const PLAN: Plan = Plan { n_examples: 10, batch_size: 4, epochs: 4, max_steps: None, seed: 9 };

fn config(select: Select) -> LoopConfig {
    LoopConfig {
        schedule: Schedule::new(ScheduleKind::Cosine, 0.3, 0.1, PLAN.total_steps()).unwrap(),
        max_grad_norm: Some(1.0),
        eval_every: 3,
        checkpoint_every: 2,
        keep_checkpoints: 2,
        select,
        shards: ShardArgs { virtual_shards: 2, reduce: Reduce::Ordered },
        dtype: "f32",
        scale_loss: false,
    }
}

/// Trains in a fresh process, as far as the loop can tell.
fn go(dir: &Path, select: Select, steps_left: u64) -> Result<(Outcome, Vec<f32>), Error> {
    let mut objective = LeastSquares { steps_left, ..LeastSquares::new() };
    let parameters = vec![("w".to_owned(), objective.weight.shallow_clone())];
    let mut optimiser = AdamW::new(parameters, AdamWConfig::default()).unwrap();
    let outcome =
        train(&Ranks::alone(), &mut objective, &mut optimiser, &PLAN, &config(select), dir, "f")?;
    Ok((outcome, Vec::try_from(objective.weight.detach()).unwrap()))
}

/// Every file that is to be the same, by name.
fn files(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let mut out = Vec::new();
    for entry in fs_err::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        if path.is_dir() {
            out.extend(
                files(&path).into_iter().map(|(file, bytes)| (format!("{name}/{file}"), bytes)),
            );
        } else if name != "timings.jsonl" && !name.contains("tfevents") {
            out.push((name, fs_err::read(&path).unwrap()));
        }
    }
    out.sort();
    out
}

#[test]
fn wherever_it_dies_it_ends_the_same() {
    for select in [Select::Last, Select::Best] {
        let whole = tempfile::tempdir().unwrap();
        let (outcome, weights) = go(whole.path(), select, u64::MAX).unwrap();
        assert_eq!(outcome.state.global_step, 12);
        assert_eq!(outcome.state.num_tokens, 36);
        for steps in [vec![1], vec![2], vec![5], vec![11], vec![3, 4, 1], vec![1; 4]] {
            let dir = tempfile::tempdir().unwrap();
            for &steps in &steps {
                go(dir.path(), select, steps).unwrap_err();
            }
            let resumed = go(dir.path(), select, u64::MAX).unwrap();
            assert_eq!(resumed, (outcome.clone(), weights.clone()), "dying after {steps:?}");
            assert_eq!(files(dir.path()), files(whole.path()), "dying after {steps:?}");
        }
        // A finished run has nothing left to do.
        let before = files(whole.path());
        assert_eq!(go(whole.path(), select, 0).unwrap(), (outcome, weights));
        assert_eq!(files(whole.path()), before);
    }
}

#[test]
fn the_loss_falls_and_is_logged() {
    let dir = tempfile::tempdir().unwrap();
    go(dir.path(), Select::Last, u64::MAX).unwrap();
    let lines: Vec<serde_json::Value> = fs_err::read_to_string(dir.path().join("metrics.jsonl"))
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let keys: Vec<&String> = lines[0].as_object().unwrap().keys().collect();
    let expected = ["step", "loss", "twice", "grad_norm", "learning_rate", "num_tokens", "epoch"];
    assert_eq!(keys, expected);
    let evaluations: Vec<f64> =
        lines.iter().filter_map(|line| line.get("eval_loss")?.as_f64()).collect();
    assert_eq!(evaluations.len(), 4);
    assert!(evaluations[3] < evaluations[0], "{evaluations:?}");
    assert_eq!(lines.iter().filter(|line| line.get("eval_half").is_some()).count(), 4);
}

#[test]
fn a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let mut objective = LeastSquares::new();
    // An example that the first two steps do not see.
    let early: Vec<usize> = (0..2).flat_map(|step| PLAN.examples(step)).collect();
    objective.bad_at = (0..10).find(|idx| !early.contains(idx));
    let parameters = vec![("w".to_owned(), objective.weight.shallow_clone())];
    let mut optimiser = AdamW::new(parameters, AdamWConfig::default()).unwrap();
    let config = config(Select::Last);
    let error =
        train(&Ranks::alone(), &mut objective, &mut optimiser, &PLAN, &config, dir.path(), "f")
            .unwrap_err();
    assert!(error.to_string().starts_with("step 3: the loss is not finite"), "{error}");
    // Without the bad example the run goes on from step 2.
    let whole = tempfile::tempdir().unwrap();
    let expected = go(whole.path(), Select::Last, u64::MAX).unwrap();
    assert_eq!(go(dir.path(), Select::Last, u64::MAX).unwrap(), expected);
}

#[test]
fn another_runs_checkpoint_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    go(dir.path(), Select::Last, 5).unwrap_err();
    let mut objective = LeastSquares::new();
    let parameters = vec![("w".to_owned(), objective.weight.shallow_clone())];
    let mut optimiser = AdamW::new(parameters, AdamWConfig::default()).unwrap();
    let config = config(Select::Last);
    let error =
        train(&Ranks::alone(), &mut objective, &mut optimiser, &PLAN, &config, dir.path(), "g")
            .unwrap_err();
    assert!(matches!(error, Error::Checkpoint { .. }), "{error}");
}

/// As [`go`] in f16, where scales above `overflow_above` overflow.
fn go_scaled(
    dir: &Path,
    overflow_above: f64,
    steps_left: u64,
) -> Result<(Outcome, Vec<f32>), Error> {
    let mut objective = LeastSquares { overflow_above, steps_left, ..LeastSquares::new() };
    let parameters = vec![("w".to_owned(), objective.weight.shallow_clone())];
    let mut optimiser = AdamW::new(parameters, AdamWConfig::default()).unwrap();
    let config = LoopConfig { scale_loss: true, ..config(Select::Last) };
    let outcome = train(&Ranks::alone(), &mut objective, &mut optimiser, &PLAN, &config, dir, "f")?;
    Ok((outcome, Vec::try_from(objective.weight.detach()).unwrap()))
}

/// Loss scale and gradient norm of every step, as logged.
fn logged_scales(dir: &Path) -> Vec<(f64, Option<f64>)> {
    fs_err::read_to_string(dir.join("metrics.jsonl"))
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
        .filter_map(|line| Some((line.get("loss_scale")?.as_f64()?, line["grad_norm"].as_f64())))
        .collect()
}

#[test]
fn overflow_in_f16_skips_the_step_and_halves_the_scale() {
    let dir = tempfile::tempdir().unwrap();
    let mut objective =
        LeastSquares { overflow_above: 20000.0, steps_left: 2, ..LeastSquares::new() };
    let parameters = vec![("w".to_owned(), objective.weight.shallow_clone())];
    let mut optimiser = AdamW::new(parameters, AdamWConfig::default()).unwrap();
    let config = LoopConfig { scale_loss: true, ..config(Select::Last) };
    // 65536 and 32768 overflow: nothing has moved.
    train(&Ranks::alone(), &mut objective, &mut optimiser, &PLAN, &config, dir.path(), "f")
        .unwrap_err();
    assert_eq!(optimiser.n_steps(), 0);
    for (name, tensor) in optimiser.state("o") {
        assert_eq!(f64::try_from(tensor.abs().sum(Kind::Double)).unwrap(), 0.0, "{name}");
    }
    assert_eq!(objective.weight.grad().abs().max().double_value(&[]), 0.0);
    // The ten steps at 16384 are taken.
    objective.steps_left = u64::MAX;
    let outcome =
        train(&Ranks::alone(), &mut objective, &mut optimiser, &PLAN, &config, dir.path(), "f")
            .unwrap();
    assert_eq!(outcome.state.loss_scale, (16384.0, 10));
    assert_eq!(optimiser.n_steps(), 10);
    assert_eq!(outcome.state.global_step, 12);
    let logged = logged_scales(dir.path());
    assert_eq!(logged.len(), 12);
    assert_eq!(logged[..2], [(65536.0, None), (32768.0, None)]);
    assert!(logged[2..].iter().all(|(scale, norm)| *scale == 16384.0 && norm.is_some()));
}

#[test]
fn an_interrupt_loses_nothing_of_the_loss_scale() {
    let whole = tempfile::tempdir().unwrap();
    let expected = go_scaled(whole.path(), 20000.0, u64::MAX).unwrap();
    for steps in [vec![1], vec![2], vec![3], vec![7, 2]] {
        let dir = tempfile::tempdir().unwrap();
        for &steps in &steps {
            go_scaled(dir.path(), 20000.0, steps).unwrap_err();
        }
        let resumed = go_scaled(dir.path(), 20000.0, u64::MAX).unwrap();
        assert_eq!(resumed, expected, "dying after {steps:?}");
        assert_eq!(files(dir.path()), files(whole.path()), "dying after {steps:?}");
    }
}

/// As PyTorch's `GradScaler` with its `growth_interval` of 2000.
#[test]
fn the_loss_scale_doubles_after_2000_steps_without_overflow() {
    let dir = tempfile::tempdir().unwrap();
    go_scaled(dir.path(), f64::INFINITY, 5).unwrap_err();
    let store = CheckpointStore::new(dir.path(), "f", "f32", 2);
    let mut loaded = store.load::<TrainerState>(4).unwrap();
    assert_eq!(loaded.state.loss_scale, (65536.0, 4));
    loaded.state.loss_scale = (1024.0, 1998);
    let tensors: Vec<(String, Tensor)> = loaded.tensors.into_iter().collect();
    store.save(4, &tensors, &loaded.state, &[]).unwrap();
    let (outcome, _) = go_scaled(dir.path(), f64::INFINITY, u64::MAX).unwrap();
    // Step 6 is the 2000th; six more follow.
    assert_eq!(outcome.state.loss_scale, (2048.0, 6));
    let scales: Vec<f64> = logged_scales(dir.path()).into_iter().map(|(scale, _)| scale).collect();
    assert_eq!(scales, [[65536.0; 4].as_slice(), &[1024.0; 2], &[2048.0; 6]].concat());
}

#[test]
fn a_loss_scale_changes_nothing_but_rounding() {
    let dir = tempfile::tempdir().unwrap();
    let mut objective = LeastSquares::new();
    let parameters = vec![("w".to_owned(), objective.weight.shallow_clone())];
    let mut optimiser = AdamW::new(parameters, AdamWConfig::default()).unwrap();
    let config = LoopConfig { scale_loss: true, ..config(Select::Last) };
    train(&Ranks::alone(), &mut objective, &mut optimiser, &PLAN, &config, dir.path(), "f")
        .unwrap();
    let (_, unscaled) = go(tempfile::tempdir().unwrap().path(), Select::Last, u64::MAX).unwrap();
    let scaled: Vec<f32> = Vec::try_from(objective.weight.detach()).unwrap();
    for (a, b) in scaled.iter().zip(&unscaled) {
        assert!((a - b).abs() <= 1e-5 * b.abs(), "{a} {b}");
    }
}
