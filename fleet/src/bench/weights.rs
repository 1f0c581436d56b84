//! The weights in an ONNX file, and what a training does to them. Nothing is built: only the wire format is
//! followed, so that everything else of the file stays as it is.

use std::ops::Range;

use anyhow::Context;

use crate::dice::Dice;

/// Numbers of the fields in onnx.proto.
const MODEL_GRAPH: u64 = 7;
const GRAPH_INITIALIZER: u64 = 5;
const TENSOR_DIMS: u64 = 1;
const TENSOR_DATA_TYPE: u64 = 2;
const TENSOR_NAME: u64 = 8;
const TENSOR_RAW_DATA: u64 = 9;
/// The data type of 32-bit floats.
const FLOAT: u64 = 1;
/// What the shipped bundles call the last layer's tensors.
const HEAD: &str = "head.";

/// A stored tensor of 32-bit floats: what it is called, and where its numbers lie in the file.
#[derive(Clone, Debug, PartialEq)]
struct Tensor {
    name: String,
    at: Range<usize>,
}

/// The value of a field.
enum Value {
    Number(u64),
    Bytes(Range<usize>),
    Fixed,
}

/// The fields of the message that lies in `file` from `at` to `end`.
struct Fields<'a> {
    file: &'a [u8],
    at: usize,
    end: usize,
}

impl Fields<'_> {
    fn varint(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = *self.file.get(self.at..self.end)?.first()?;
            self.at += 1;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    fn skip(&mut self, length: u64) -> Option<Range<usize>> {
        let from = self.at;
        let to = from.checked_add(usize::try_from(length).ok()?)?;
        self.at = to;
        (to <= self.end).then_some(from..to)
    }

    fn field(&mut self) -> Option<(u64, Value)> {
        let tag = self.varint()?;
        let value = match tag & 7 {
            0 => Value::Number(self.varint()?),
            1 => self.skip(8).map(|_| Value::Fixed)?,
            2 => {
                let length = self.varint()?;
                Value::Bytes(self.skip(length)?)
            }
            5 => self.skip(4).map(|_| Value::Fixed)?,
            _ => return None,
        };
        Some((tag >> 3, value))
    }
}

/// All fields of a message; nothing if it is none.
fn fields(file: &[u8], message: Range<usize>) -> Option<Vec<(u64, Value)>> {
    let mut fields = Fields {
        file,
        at: message.start,
        end: message.end,
    };
    let mut found = Vec::new();
    while fields.at < fields.end {
        found.push(fields.field()?);
    }
    Some(found)
}

/// The messages in the field `number` of a message.
fn parts(file: &[u8], message: Range<usize>, number: u64) -> Option<Vec<Range<usize>>> {
    let of_field = |(field, value): (u64, Value)| match value {
        Value::Bytes(at) if field == number => Some(at),
        _ => None,
    };
    let all = fields(file, message)?;
    Some(all.into_iter().filter_map(of_field).collect())
}

fn find(file: &[u8]) -> Option<Vec<Tensor>> {
    let mut found = Vec::new();
    for graph in parts(file, 0..file.len(), MODEL_GRAPH)? {
        for message in parts(file, graph, GRAPH_INITIALIZER)? {
            let (mut name, mut kind, mut numbers) = (0..0, 0, 0..0);
            for (field, value) in fields(file, message)? {
                match (field, value) {
                    (TENSOR_DATA_TYPE, Value::Number(number)) => kind = number,
                    (TENSOR_NAME, Value::Bytes(at)) => name = at,
                    (TENSOR_RAW_DATA, Value::Bytes(at)) => numbers = at,
                    _ => {}
                }
            }
            if kind == FLOAT && !numbers.is_empty() {
                let name = file.get(name)?;
                found.push(Tensor {
                    name: String::from_utf8_lossy(name).into_owned(),
                    at: numbers,
                });
            }
        }
    }
    Some(found)
}

fn tensors(file: &[u8]) -> anyhow::Result<Vec<Tensor>> {
    let found = find(file).context("this is no ONNX file")?;
    anyhow::ensure!(
        !found.is_empty(),
        "no tensor of 32-bit floats is stored raw"
    );
    Ok(found)
}

fn numbers(file: &[u8], tensor: &Tensor) -> Vec<f32> {
    let bytes = file.get(tensor.at.clone()).unwrap_or_default();
    let numbers = bytes.as_chunks::<4>().0.iter();
    numbers.map(|n| f32::from_le_bytes(*n)).collect()
}

fn change(file: &mut [u8], tensor: &Tensor, mut change: impl FnMut(f32) -> f32) {
    let bytes = file.get_mut(tensor.at.clone()).unwrap_or_default();
    for number in bytes.as_chunks_mut::<4>().0 {
        *number = change(f32::from_le_bytes(*number)).to_le_bytes();
    }
}

/// A number from -1 to 1, evenly.
fn throw(dice: &mut Dice) -> f32 {
    // As many bits as fit into the number.
    let unit = (dice.any() >> 40) as f32 / (1 << 24) as f32;
    2.0 * unit - 1.0
}

/// The model with another head: numbers that have nothing to do with the old ones, as widely spread.
///
/// # Errors
/// If the file is no ONNX, or has no head.
pub(super) fn new_head(file: &[u8], dice: &mut Dice) -> anyhow::Result<Vec<u8>> {
    let mut new = file.to_vec();
    let mut changed = 0;
    for tensor in tensors(file)? {
        if !tensor.name.starts_with(HEAD) {
            continue;
        }
        let old = numbers(file, &tensor);
        let squares: f32 = old.iter().map(|n| n * n).sum();
        // Even numbers up to this have the same mean square.
        let most = (3.0 * squares / old.len().max(1) as f32).sqrt();
        change(&mut new, &tensor, |_| most * throw(dice));
        changed += 1;
    }
    anyhow::ensure!(changed > 0, "no tensor is called {HEAD}…");
    Ok(new)
}

/// The model after a training of all its layers that has moved each weight by up to `share` of itself, evenly.
///
/// # Errors
/// If the file is no ONNX.
pub(super) fn fine_tuned(file: &[u8], share: f32, dice: &mut Dice) -> anyhow::Result<Vec<u8>> {
    let mut new = file.to_vec();
    for tensor in tensors(file)? {
        change(&mut new, &tensor, |n| n * (1.0 + share * throw(dice)));
    }
    Ok(new)
}

/// A file of at least so many bytes: the model's tensors again and again, each time a little larger so that
/// nothing repeats itself, and its head at the end. It has no operators: who travels does not look at them.
///
/// # Errors
/// If the file is no ONNX.
pub(super) fn enlarged(file: &[u8], least: usize) -> anyhow::Result<Vec<u8>> {
    let (head, body): (Vec<Tensor>, Vec<Tensor>) = tensors(file)?
        .into_iter()
        .partition(|tensor| tensor.name.starts_with(HEAD));
    anyhow::ensure!(!body.is_empty(), "nothing lies below the head");
    let mut graph = Vec::new();
    for copy in 1_u8..=u8::MAX {
        for tensor in &body {
            let times = 1.0 + f32::from(copy) / 17.0;
            let scaled = numbers(file, tensor).into_iter().map(|n| n * times);
            put_tensor(&mut graph, &format!("{copy}.{}", tensor.name), scaled);
        }
        if graph.len() >= least {
            break;
        }
    }
    for tensor in &head {
        put_tensor(&mut graph, &tensor.name, numbers(file, tensor).into_iter());
    }
    let mut model = Vec::with_capacity(graph.len() + 16);
    put(&mut model, MODEL_GRAPH, &graph);
    Ok(model)
}

/// The model with so many bytes more, of weights that no operator uses: it says what it said, and is as heavy on its way as a
/// large one.
pub(super) fn laden(file: &[u8], bytes: usize, dice: &mut Dice) -> Vec<u8> {
    let count = bytes / size_of::<f32>();
    let mut tensor = Vec::with_capacity(bytes + 64);
    put_varint(&mut tensor, TENSOR_DIMS << 3);
    put_varint(&mut tensor, count as u64);
    put_varint(&mut tensor, TENSOR_DATA_TYPE << 3);
    put_varint(&mut tensor, FLOAT);
    put(&mut tensor, TENSOR_NAME, b"load");
    let raw: Vec<u8> = (0..count).flat_map(|_| throw(dice).to_le_bytes()).collect();
    put(&mut tensor, TENSOR_RAW_DATA, &raw);
    let mut graph = Vec::with_capacity(tensor.len() + 16);
    put(&mut graph, GRAPH_INITIALIZER, &tensor);
    // What stands twice in a message is joined when it is read.
    let mut model = file.to_vec();
    put(&mut model, MODEL_GRAPH, &graph);
    model
}

fn put_tensor(graph: &mut Vec<u8>, name: &str, numbers: impl Iterator<Item = f32>) {
    let raw: Vec<u8> = numbers.flat_map(f32::to_le_bytes).collect();
    let mut tensor = Vec::with_capacity(raw.len() + name.len() + 16);
    put_varint(&mut tensor, TENSOR_DATA_TYPE << 3);
    put_varint(&mut tensor, FLOAT);
    put(&mut tensor, TENSOR_NAME, name.as_bytes());
    put(&mut tensor, TENSOR_RAW_DATA, &raw);
    put(graph, GRAPH_INITIALIZER, &tensor);
}

fn put(to: &mut Vec<u8>, field: u64, bytes: &[u8]) {
    put_varint(to, field << 3 | 2);
    put_varint(to, bytes.len() as u64);
    to.extend_from_slice(bytes);
}

fn put_varint(to: &mut Vec<u8>, mut number: u64) {
    while number > 0x7f {
        to.push(number as u8 | 0x80);
        number >>= 7;
    }
    to.push(number as u8);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model() -> Vec<u8> {
        let mut graph = Vec::new();
        put_tensor(&mut graph, "unit0.weight", (1..=100).map(|n| n as f32));
        put_tensor(&mut graph, "head.weight", (1..=10).map(|n| n as f32));
        let mut model = Vec::new();
        put(&mut model, MODEL_GRAPH, &graph);
        model
    }

    #[test]
    fn a_training_changes_what_it_says() {
        let old = model();
        let all = tensors(&old).unwrap();
        let names: Vec<&str> = all.iter().map(|t| t.name.as_str()).collect();
        assert_eq!(names, ["unit0.weight", "head.weight"]);
        assert_eq!(numbers(&old, &all[1])[9], 10.0);

        let new = new_head(&old, &mut Dice::new(1)).unwrap();
        assert_eq!(tensors(&new).unwrap(), all);
        assert_eq!(numbers(&new, &all[0]), numbers(&old, &all[0]));
        let pairs = |new: &[u8], at: usize| -> Vec<(f32, f32)> {
            let new = numbers(new, &all[at]);
            numbers(&old, &all[at]).into_iter().zip(new).collect()
        };
        assert!(pairs(&new, 1).iter().all(|(old, new)| old != new));

        let new = fine_tuned(&old, 1e-2, &mut Dice::new(1)).unwrap();
        for (old, new) in pairs(&new, 0).into_iter().chain(pairs(&new, 1)) {
            assert!(old != new && (new / old - 1.0).abs() <= 1.01e-2);
        }
        assert_eq!(new, fine_tuned(&old, 1e-2, &mut Dice::new(1)).unwrap());
    }

    #[test]
    fn an_enlarged_model_is_one_with_a_head() {
        let large = enlarged(&model(), 2_000).unwrap();
        assert!((2_000..3_000).contains(&large.len()));
        let all = tensors(&large).unwrap();
        assert_eq!(all.last().unwrap().name, "head.weight");
        assert!(numbers(&large, &all[0]) != numbers(&large, &all[1]));
        assert!(new_head(&large, &mut Dice::new(1)).is_ok());
        assert!(tensors(b"no ONNX at all").is_err());
    }

    #[test]
    fn a_laden_model_says_what_it_said() {
        let bundle = models::Bundle::open(&crate::cli::shipped_bundle("conveyor").unwrap());
        let bundle = bundle.unwrap();
        let file = bundle.model_bytes().unwrap();
        let large = laden(&file, 1 << 20, &mut Dice::new(1));
        assert!(large.len() > file.len() + (1 << 20));
        let dir = tempfile::tempdir().unwrap();
        let to = dir.path().join("laden");
        super::super::swarm::write_model(&bundle, "9.9.9", large.clone(), &to).unwrap();
        let (old, new) = (
            models::Engine::load(&bundle).unwrap(),
            models::Engine::load(&models::Bundle::open(&to).unwrap()).unwrap(),
        );
        let picture = bundle.dir().join(&bundle.manifest.golden[0].image);
        let picture = models::Picture::read(&picture).unwrap();
        assert_eq!(
            old.infer(&picture).unwrap().scores,
            new.infer(&picture).unwrap().scores
        );
        // A training of it is a difference, and not a small one.
        let tuned = fine_tuned(&large, 1e-4, &mut Dice::new(2)).unwrap();
        let delta = models::delta::make(&large, &tuned).unwrap();
        assert!((1 << 18..1 << 20).contains(&delta.len()), "{}", delta.len());
    }
}
