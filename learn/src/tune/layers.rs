//! Nodes with weights: convolution, dense layer, batch norm.

use super::{
    TuneError,
    file::Reader,
    graph::{Builder, Op},
    ops::{
        Shape,
        conv::{Conv, Window},
        depthwise::Depthwise,
        point::Norm,
    },
};

impl Builder {
    /// A constant of a given shape, trained with `layer`.
    fn weights(
        &mut self,
        node: &Reader<'_>,
        at: usize,
        layer: usize,
        decays: bool,
        fits: impl FnOnce(&[usize]) -> bool,
    ) -> Result<Option<usize>, TuneError> {
        let Some(constant) = self.constant(node, at)? else {
            return Ok(None);
        };
        let shape = &self.constants[constant].shape;
        if !fits(shape) {
            return Err(node.refuse(format!("its input {at} is of shape {shape:?}")));
        }
        self.train(constant, layer, decays);
        Ok(Some(constant))
    }

    /// Conv, depthwise or not.
    pub(super) fn conv(&mut self, node: &Reader<'_>) -> Result<(), TuneError> {
        let input = self.picture(node)?;
        let from = self.shapes[input];
        let layer = self.layer();
        let weight = self
            .weights(node, 1, layer, true, |shape| {
                shape.len() == 4 && !shape.contains(&0)
            })?
            .ok_or_else(|| node.refuse("no weights"))?;
        let shape = &self.constants[weight].shape;
        let (outputs, inputs, kernel) = (shape[0], shape[1], [shape[2], shape[3]]);
        let groups = usize::try_from(node.int("group", 1)).unwrap_or(0);
        if groups == 0 || outputs % groups != 0 || inputs.checked_mul(groups) != Some(from.c) {
            return Err(node.refuse(format!(
                "weights of shape {shape:?} in {groups} groups do not fit {} channels",
                from.c
            )));
        }
        if node.attribute("kernel_shape").is_some() && node.sizes::<2>("kernel_shape", 0)? != kernel
        {
            return Err(node.refuse("kernel_shape is not that of the weights"));
        }
        let bias = self.weights(node, 2, layer, false, |shape| shape == [outputs])?;
        let (window, to) = Self::window(node, from, kernel)?;
        let to = Shape { c: outputs, ..to };
        // Checked here because the operator keeps a table of its pixels.
        if to.len().max(from.len()) > super::graph::MAX_VALUES {
            return Err(node.refuse("its result is too large"));
        }
        let op = if groups == from.c && inputs == 1 && outputs == from.c && groups > 1 {
            Op::Depthwise {
                conv: Depthwise::new(from, to, window),
                weight,
                bias,
            }
        } else {
            Op::Conv {
                conv: Conv::new(from, to, window, groups, false),
                weight,
                bias,
            }
        };
        self.push(node, op, vec![input], to, Some(layer))
    }

    /// Gemm with constant weights.
    pub(super) fn gemm(&mut self, node: &Reader<'_>) -> Result<(), TuneError> {
        if node.int("transA", 0) != 0
            || node.float("alpha", 1.0) != 1.0
            || node.float("beta", 1.0) != 1.0
        {
            return Err(node.refuse("transA, alpha and beta are not supported"));
        }
        self.dense(node, node.int("transB", 0) != 0)
    }

    /// A dense layer: a convolution of one pixel.
    pub(super) fn dense(
        &mut self,
        node: &Reader<'_>,
        outputs_first: bool,
    ) -> Result<(), TuneError> {
        let input = self.value(node, 0)?;
        let from = self.shapes[input];
        if !from.flat {
            return Err(node.refuse("its input is not [N, D]"));
        }
        let layer = self.layer();
        let side = usize::from(outputs_first);
        let weight = self
            .weights(node, 1, layer, true, |shape| {
                shape.len() == 2 && shape[side] == from.c && shape[1 - side] > 0
            })?
            .ok_or_else(|| node.refuse("no weights"))?;
        let outputs = self.constants[weight].shape[1 - side];
        let bias = self.weights(node, 2, layer, false, |shape| {
            shape == [outputs] || shape == [1, outputs]
        })?;
        let to = Shape::flat(outputs);
        let window = Window {
            kernel: (1, 1),
            stride: (1, 1),
            pads: [0; 4],
        };
        let conv = Conv::new(from, to, window, 1, !outputs_first);
        self.push(
            node,
            Op::Conv { conv, weight, bias },
            vec![input],
            to,
            Some(layer),
        )
    }

    /// Batch norm with its statistics.
    pub(super) fn norm(&mut self, node: &Reader<'_>) -> Result<(), TuneError> {
        if node.int("training_mode", 0) != 0 {
            return Err(node.refuse("batch norm in training mode"));
        }
        let input = self.value(node, 0)?;
        let shape = self.shapes[input];
        // Belongs to the layer in front of it.
        let layer = self.made_by[input].unwrap_or(0);
        let mut inputs = [0; 4];
        for (at, constant) in inputs.iter_mut().enumerate() {
            *constant = self
                .constant(node, at + 1)?
                .filter(|&constant| self.constants[constant].shape == [shape.c])
                .ok_or_else(|| {
                    node.refuse(format!("its input {} is not one per channel", at + 1))
                })?;
        }
        let [scale, bias, mean, variance] = inputs;
        self.train(scale, layer, false);
        self.train(bias, layer, false);
        let epsilon = node.float("epsilon", 1e-5);
        let rate = self.constants[variance].values.iter();
        let norm = Norm {
            mean: self.constants[mean].values.clone(),
            rate: rate
                .map(|variance| 1.0 / (variance + epsilon).sqrt())
                .collect(),
        };
        self.push(
            node,
            Op::Norm { norm, scale, bias },
            vec![input],
            shape,
            Some(layer),
        )
    }
}
