//! One model across several devices: which consecutive steps run on which board.
//!
//! Frames go through the parts as through a pipeline: how many come out in a second is decided by the part that takes
//! longest, how long one takes by all of them. So the plan makes the longest part short, and among plans that do not differ
//! by much takes the one with the fewest boards: each is one more that can disappear.
//!
//! The first part always runs on the board that leads: pictures stay there, and only what was computed from them travels.

use alloc::{vec, vec::Vec};

/// Boards that a plan may use, the one that leads included.
pub const MAX_BOARDS: usize = 6;
/// Steps of a model.
pub const MAX_STEPS: usize = 128;
/// A plan with more boards has to be better by this share.
const WORTH: f64 = 0.1;

/// What lies between two places where the model can be cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// Multiply-adds of one run.
    pub operations: u64,
    /// Bytes of its stored tensors.
    pub weights: u64,
    /// Bytes of the value that goes to the next step.
    pub travels: u64,
}

/// Somebody who can run steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Board {
    /// Multiply-adds per microsecond, as measured; above 0.
    pub speed: f64,
    /// Bytes of weights that it has room for.
    pub room: u64,
    /// Of its time that it gives, above 0, at most 1: it takes so much longer for one frame after another.
    pub share: f64,
}

impl Board {
    /// Is it one that there can be?
    #[must_use]
    pub fn is_sound(&self) -> bool {
        self.speed.is_finite() && self.speed > 0.0 && self.share > 0.0 && self.share <= 1.0
    }
}

/// Consecutive steps on one board.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stage {
    /// Its place in the list of boards.
    pub board: usize,
    /// The first step …
    pub from: usize,
    /// … and the one behind the last.
    pub to: usize,
}

/// How a model is cut.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// In the order in which a frame goes through them; the first is on the board that leads.
    pub stages: Vec<Stage>,
    /// Microseconds of the longest stage: at best that lies between two frames.
    pub longest_us: f64,
    /// Microseconds of all stages: at best a frame takes that.
    pub whole_us: f64,
}

/// Steps, boards and the way between them.
struct Problem<'a> {
    steps: &'a [Step],
    boards: &'a [Board],
    /// Bytes per microsecond.
    road: f64,
}

impl Problem<'_> {
    /// How long a board takes for these steps, with what comes and what goes; nothing if it has no room for them.
    fn cost(&self, board: usize, from: usize, to: usize) -> Option<f64> {
        let (board, steps) = (self.boards.get(board)?, self.steps.get(from..to)?);
        if steps.iter().map(|step| step.weights).sum::<u64>() > board.room {
            return None;
        }
        let operations: u64 = steps.iter().map(|step| step.operations).sum();
        let comes = from.checked_sub(1).map_or(0, |at| self.steps[at].travels);
        let goes = if to == self.steps.len() {
            0
        } else {
            steps.last().map_or(0, |step| step.travels)
        };
        let speed = board.speed * board.share;
        Some(operations as f64 / speed + (comes + goes) as f64 / self.road)
    }
}

/// Microseconds of the longest of these stages; nothing if a board has no room for its stage, or is none.
#[must_use]
pub fn longest(steps: &[Step], boards: &[Board], road: f64, stages: &[Stage]) -> Option<f64> {
    let problem = Problem {
        steps,
        boards,
        road,
    };
    let cost = |stage: &Stage| problem.cost(stage.board, stage.from, stage.to);
    stages
        .iter()
        .map(cost)
        .try_fold(0.0, |most: f64, cost| Some(most.max(cost?)))
}

/// The best that is known of reaching a step with certain boards.
#[derive(Clone, Copy, Debug)]
struct Best {
    longest: f64,
    whole: f64,
    /// The last stage.
    stage: Stage,
    /// The boards before it.
    before: usize,
}

impl Best {
    fn beats(&self, other: &Self) -> bool {
        (self.longest, self.whole) < (other.longest, other.whole)
    }
}

/// Cuts a model for these boards, of which the first leads; `road` is how many bytes a microsecond go between two of them.
/// Nothing if they have no room for it together, or if there is nothing to plan.
///
/// Boards beyond [`MAX_BOARDS`] are left out.
#[must_use]
pub fn plan(steps: &[Step], boards: &[Board], road: f64) -> Option<Plan> {
    let boards = boards.get(..MAX_BOARDS).unwrap_or(boards);
    let sound = boards.iter().all(Board::is_sound);
    if steps.is_empty() || steps.len() > MAX_STEPS || !sound || road <= 0.0 {
        return None;
    }
    let problem = Problem {
        steps,
        boards,
        road,
    };
    let (sets, ends) = (1usize << boards.len(), steps.len() + 1);
    // For each set of boards and each step that is reached with all of them.
    let mut best: Vec<Option<Best>> = vec![None; sets * ends];
    for to in 1..ends {
        if let Some(cost) = problem.cost(0, 0, to) {
            let stage = Stage {
                board: 0,
                from: 0,
                to,
            };
            best[ends + to] = Some(Best {
                longest: cost,
                whole: cost,
                stage,
                before: 0,
            });
        }
    }
    // A set is larger as a number than each that it contains.
    for set in 1..sets {
        for from in 1..ends {
            let Some(here) = best[set * ends + from] else {
                continue;
            };
            for board in (1..boards.len()).filter(|board| set & (1 << board) == 0) {
                for to in from + 1..ends {
                    let Some(cost) = problem.cost(board, from, to) else {
                        break;
                    };
                    let next = Best {
                        longest: here.longest.max(cost),
                        whole: here.whole + cost,
                        stage: Stage { board, from, to },
                        before: set,
                    };
                    let known = &mut best[(set | 1 << board) * ends + to];
                    if known.as_ref().is_none_or(|known| next.beats(known)) {
                        *known = Some(next);
                    }
                }
            }
        }
    }
    let mut chosen: Option<(usize, Best)> = None;
    for count in 1..=boards.len() {
        let with = (1..sets).filter(|set| set.count_ones() as usize == count);
        let ends_there = with.filter_map(|set| Some((set, best[set * ends + steps.len()]?)));
        let first = ends_there.reduce(|a, b| if b.1.beats(&a.1) { b } else { a });
        let Some(found) = first else { continue };
        let worth = chosen
            .as_ref()
            .is_none_or(|(_, known)| found.1.longest < known.longest * (1.0 - WORTH));
        if worth {
            chosen = Some(found);
        }
    }
    let (mut set, found) = chosen?;
    let mut stages = Vec::new();
    let mut to = steps.len();
    while let Some(Some(at)) = best.get(set * ends + to) {
        stages.push(at.stage);
        (set, to) = (at.before, at.stage.from);
        if to == 0 {
            break;
        }
    }
    stages.reverse();
    Some(Plan {
        stages,
        longest_us: found.longest,
        whole_us: found.whole,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn step(operations: u64, weights: u64, travels: u64) -> Step {
        Step {
            operations,
            weights,
            travels,
        }
    }

    const ROOMY: Board = Board {
        speed: 1.0,
        room: u64::MAX,
        share: 1.0,
    };

    #[test]
    fn equal_boards_share_equal_steps() {
        let steps = vec![step(1_000, 10, 8); 6];
        let found = plan(&steps, &[ROOMY; 3], 100.0).unwrap();
        let lengths: Vec<usize> = found.stages.iter().map(|s| s.to - s.from).collect();
        assert_eq!(lengths, [2, 2, 2]);
        assert!(found.longest_us < 2_001.0);
    }

    #[test]
    fn who_gives_less_of_its_time_gets_less() {
        let steps = vec![step(1_000, 10, 8); 6];
        let quick = Board {
            speed: 4.0,
            share: 0.125,
            ..ROOMY
        };
        // Four times as fast for an eighth of the time is half as much.
        let found = plan(&steps, &[ROOMY, quick], 100.0).unwrap();
        let lengths: Vec<usize> = found.stages.iter().map(|s| s.to - s.from).collect();
        assert_eq!(lengths, [4, 2]);
        for share in [0.0, -1.0, 1.1, f64::NAN] {
            let none = Board { share, ..ROOMY };
            assert!(!none.is_sound() && plan(&steps, &[ROOMY, none], 1.0).is_none());
        }
    }

    #[test]
    fn a_model_that_fits_nowhere_alone_fits_on_two() {
        let small = Board { room: 25, ..ROOMY };
        let steps = vec![step(1_000, 10, 1_000_000); 4];
        // The road is far too slow for it to be worth it; there is no other way.
        let found = plan(&steps, &[small; 2], 1.0).unwrap();
        assert_eq!(found.stages.len(), 2);
        assert_eq!(plan(&steps, &[small], 1.0), None);
        let narrow = Board { room: 9, ..small };
        assert_eq!(plan(&steps, &[narrow; 6], 1.0), None);
    }

    #[test]
    fn a_road_that_costs_more_than_it_brings_is_not_taken() {
        let steps = vec![step(1_000, 1, 1_000_000); 4];
        let found = plan(&steps, &[ROOMY; 4], 1.0).unwrap();
        assert_eq!(
            found.stages,
            [Stage {
                board: 0,
                from: 0,
                to: 4
            }]
        );
        // Nor one more board for a hundredth.
        let steps = [step(1_000, 1, 0), step(10, 1, 0)];
        assert_eq!(plan(&steps, &[ROOMY; 2], 1.0).unwrap().stages.len(), 1);
    }

    #[test]
    fn it_is_cut_where_little_travels() {
        let steps = [
            step(1_000, 1, 500),
            step(50, 1, 5),
            step(1_000, 1, 500),
            step(50, 1, 0),
        ];
        let found = plan(&steps, &[ROOMY; 2], 1.0).unwrap();
        assert_eq!(found.stages[0].to, 2);
    }

    /// All ways to cut, tried one by one.
    fn all_ways(problem: &Problem, used: &mut Vec<Stage>, longest: f64, best: &mut Option<f64>) {
        let from = used.last().map_or(0, |stage| stage.to);
        if from == problem.steps.len() {
            if best.is_none_or(|known| longest < known) {
                *best = Some(longest);
            }
            return;
        }
        for board in 0..problem.boards.len() {
            if used.is_empty() != (board == 0) || used.iter().any(|stage| stage.board == board) {
                continue;
            }
            for to in from + 1..=problem.steps.len() {
                if let Some(cost) = problem.cost(board, from, to) {
                    used.push(Stage { board, from, to });
                    all_ways(problem, used, longest.max(cost), best);
                    used.pop();
                }
            }
        }
    }

    proptest! {
        #[test]
        fn it_is_as_good_as_the_best_of_all_ways(
            steps in prop::collection::vec((1u64..1_000, 0u64..50, 0u64..2_000), 1..7),
            boards in prop::collection::vec((1u32..20, 10u64..200, 1u32..=10), 1..5),
            road in 1u32..100,
        ) {
            let steps: Vec<Step> = steps.into_iter().map(|(o, w, t)| step(o, w, t)).collect();
            let boards: Vec<Board> = boards
                .into_iter()
                .map(|(speed, room, tenths)| Board {
                    speed: f64::from(speed),
                    room,
                    share: f64::from(tenths) / 10.0,
                })
                .collect();
            let road = f64::from(road);
            let problem = Problem { steps: &steps, boards: &boards, road };
            let mut best = None;
            all_ways(&problem, &mut Vec::new(), 0.0, &mut best);
            let found = plan(&steps, &boards, road);
            prop_assert_eq!(found.is_some(), best.is_some());
            if let (Some(found), Some(best)) = (found, best) {
                // Fewer boards are worth a tenth.
                let worst = best / (1.0 - WORTH) + 1e-9;
                prop_assert!(found.longest_us <= worst, "{} and {best}", found.longest_us);
                // It is what it says, without holes, on boards that differ, the leader first.
                let mut longest = 0f64;
                let mut at = 0;
                let mut used = Vec::new();
                for stage in &found.stages {
                    prop_assert_eq!(stage.from, at);
                    at = stage.to;
                    prop_assert!(!used.contains(&stage.board));
                    used.push(stage.board);
                    longest = longest.max(problem.cost(stage.board, stage.from, stage.to).unwrap());
                }
                prop_assert_eq!(at, steps.len());
                prop_assert_eq!(used[0], 0);
                prop_assert!((longest - found.longest_us).abs() < 1e-6);
                prop_assert_eq!(super::longest(&steps, &boards, road, &found.stages), Some(longest));
            }
        }
    }
}
