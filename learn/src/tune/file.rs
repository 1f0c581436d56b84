//! What is read from ONNX's messages.

use tract_onnx::pb::{
    AttributeProto, NodeProto, TensorProto,
    tensor_proto::{DataLocation, DataType},
};

use super::TuneError;

/// Elements of one tensor: a gigabyte of f32.
const MAX_ELEMENTS: usize = 1 << 28;

/// Numbers from the file.
#[derive(Clone, Debug)]
pub(super) enum Numbers {
    Floats(Vec<f32>),
    Ints(Vec<i64>),
}

/// A node with its words for errors.
pub(super) struct Reader<'a> {
    pub(super) proto: &'a NodeProto,
}

impl<'a> Reader<'a> {
    /// How errors call it.
    pub(super) fn name(&self) -> String {
        let output = self.proto.output.first().map_or("", String::as_str);
        let name = if self.proto.name.is_empty() {
            output
        } else {
            &self.proto.name
        };
        format!("{} {name}", self.proto.op_type)
    }

    pub(super) fn refuse(&self, problem: impl Into<String>) -> TuneError {
        TuneError::Refused {
            node: self.name(),
            problem: problem.into(),
        }
    }

    pub(super) fn attribute(&self, name: &str) -> Option<&'a AttributeProto> {
        self.proto
            .attribute
            .iter()
            .find(|attribute| attribute.name == name)
    }

    pub(super) fn int(&self, name: &str, default: i64) -> i64 {
        self.attribute(name)
            .map_or(default, |attribute| attribute.i)
    }

    pub(super) fn float(&self, name: &str, default: f32) -> f32 {
        self.attribute(name)
            .map_or(default, |attribute| attribute.f)
    }

    pub(super) fn text(&self, name: &str) -> String {
        self.attribute(name).map_or(String::new(), |attribute| {
            String::from_utf8_lossy(&attribute.s).into_owned()
        })
    }

    /// A list of sizes; `default` where it is missing.
    pub(super) fn sizes<const L: usize>(
        &self,
        name: &str,
        default: usize,
    ) -> Result<[usize; L], TuneError> {
        let Some(attribute) = self.attribute(name).filter(|a| !a.ints.is_empty()) else {
            return Ok([default; L]);
        };
        let wrong = || self.refuse(format!("{name} is {:?}", attribute.ints));
        let mut sizes = [0; L];
        if attribute.ints.len() != L {
            return Err(wrong());
        }
        for (size, value) in sizes.iter_mut().zip(&attribute.ints) {
            // No window of a picture is larger.
            *size = usize::try_from(*value)
                .ok()
                .filter(|size| *size <= 4096)
                .ok_or_else(wrong)?;
        }
        Ok(sizes)
    }
}

/// A tensor's numbers, as many as its dimensions say.
pub(super) fn numbers(tensor: &TensorProto) -> Result<(Vec<usize>, Numbers), String> {
    if tensor.data_location == Some(DataLocation::External as i32) || tensor.segment.is_some() {
        return Err("its data is not in the file".into());
    }
    let sizes = tensor.dims.iter().map(|&dim| usize::try_from(dim).ok());
    let shape: Vec<usize> = sizes
        .collect::<Option<_>>()
        .ok_or_else(|| format!("its dimensions are {:?}", tensor.dims))?;
    let count = shape
        .iter()
        .try_fold(1usize, |product, &dim| product.checked_mul(dim))
        .filter(|&count| count <= MAX_ELEMENTS)
        .ok_or_else(|| format!("its dimensions are {shape:?}"))?;
    let raw = &tensor.raw_data;
    let (numbers, found) = match DataType::try_from(tensor.data_type) {
        Ok(DataType::Float) => {
            let values = if raw.is_empty() {
                tensor.float_data.clone()
            } else {
                raw.as_chunks()
                    .0
                    .iter()
                    .map(|bytes| f32::from_le_bytes(*bytes))
                    .collect()
            };
            let found = values.len();
            (Numbers::Floats(values), found)
        }
        Ok(DataType::Int64) => {
            let values = if raw.is_empty() {
                tensor.int64_data.clone()
            } else {
                raw.as_chunks()
                    .0
                    .iter()
                    .map(|bytes| i64::from_le_bytes(*bytes))
                    .collect()
            };
            let found = values.len();
            (Numbers::Ints(values), found)
        }
        _ => return Err(format!("its element type is {}", tensor.data_type)),
    };
    if found == count {
        Ok((shape, numbers))
    } else {
        Err(format!(
            "it has {found} elements, its dimensions are {shape:?}"
        ))
    }
}

/// The numbers of a Constant node.
pub(super) fn constant(node: &Reader<'_>) -> Result<(Vec<usize>, Numbers), TuneError> {
    if let Some(tensor) = node
        .attribute("value")
        .and_then(|attribute| attribute.t.as_ref())
    {
        return numbers(tensor).map_err(|problem| node.refuse(problem));
    }
    if let Some(attribute) = node.attribute("value_float") {
        return Ok((Vec::new(), Numbers::Floats(vec![attribute.f])));
    }
    if let Some(attribute) = node.attribute("value_floats") {
        return Ok((
            vec![attribute.floats.len()],
            Numbers::Floats(attribute.floats.clone()),
        ));
    }
    if let Some(attribute) = node.attribute("value_int") {
        return Ok((Vec::new(), Numbers::Ints(vec![attribute.i])));
    }
    if let Some(attribute) = node.attribute("value_ints") {
        return Ok((
            vec![attribute.ints.len()],
            Numbers::Ints(attribute.ints.clone()),
        ));
    }
    Err(node.refuse("the constant has no number"))
}

/// Replaces a tensor's numbers, which must be as many as before.
pub(super) fn replace(tensor: &mut TensorProto, values: &[f32]) {
    tensor.float_data.clear();
    tensor.raw_data = values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
}
