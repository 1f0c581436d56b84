//! The bit stream of a scan, and the Huffman codes in it.

/// Bits that are looked up at once. Nearly all codes with their values are shorter.
const LOOK: usize = 10;

/// Reads bits from the most significant on. Past the end or a marker it gives zeros, and remembers.
pub(super) struct Bits<'a> {
    bytes: &'a [u8],
    at: usize,
    /// Left-aligned.
    buffer: u64,
    count: u32,
    /// How many of the buffer's bits are zeros of our own, at its end.
    padding: u32,
}

impl<'a> Bits<'a> {
    pub(super) fn new(bytes: &'a [u8], at: usize) -> Self {
        Self {
            bytes,
            at,
            buffer: 0,
            count: 0,
            padding: 0,
        }
    }

    /// Makes at least 32 bits available: the longest code with the longest value.
    #[inline]
    fn fill(&mut self) {
        if self.count >= 32 {
            return;
        }
        if let Some(&[a, b, c, d]) = self.bytes.get(self.at..).and_then(<[u8]>::first_chunk) {
            let word = u32::from_be_bytes([a, b, c, d]);
            // Has any byte all bits set? Then the careful way.
            let inverse = !word;
            if inverse.wrapping_sub(0x0101_0101) & word & 0x8080_8080 == 0 {
                self.buffer |= u64::from(word) << (32 - self.count);
                self.count += 32;
                self.at += 4;
                return;
            }
        }
        self.fill_bytes();
    }

    #[cold]
    fn fill_bytes(&mut self) {
        while self.count <= 56 {
            let byte = match (self.bytes.get(self.at), self.bytes.get(self.at + 1)) {
                (Some(0xff), Some(0)) => {
                    self.at += 2;
                    0xff
                }
                (Some(0xff), _) | (None, _) => {
                    self.padding += 8;
                    0
                }
                (Some(&byte), _) => {
                    self.at += 1;
                    byte
                }
            };
            self.buffer |= u64::from(byte) << (56 - self.count);
            self.count += 8;
        }
    }

    #[inline]
    fn skip(&mut self, bits: u32) {
        self.buffer <<= bits;
        self.count -= bits;
    }

    /// The next `bits` (1 to 16), which are there after a [`Bits::fill`].
    #[inline]
    fn peek(&self, bits: u32) -> usize {
        #[expect(clippy::cast_possible_truncation, reason = "at most 16 bits")]
        let value = (self.buffer >> (64 - bits)) as usize;
        value
    }

    /// The next `size` bits as a coefficient: the upper half of the range is positive.
    #[inline]
    fn value(&mut self, size: u32) -> i32 {
        if size == 0 {
            return 0;
        }
        let value = signed(self.peek(size), size);
        self.skip(size);
        value
    }

    /// Was more read than there is?
    pub(super) fn overrun(&self) -> bool {
        self.padding > self.count
    }

    /// Steps over the restart marker that must be next.
    pub(super) fn restart(&mut self) -> Result<(), &'static str> {
        // What is left before it is less than a byte of filling.
        let left = self.count - self.padding.min(self.count);
        let marker = self.bytes.get(self.at..self.at + 2);
        if left >= 8 || !matches!(marker, Some([0xff, 0xd0..=0xd7])) || self.overrun() {
            return Err("a restart mark is missing");
        }
        *self = Self::new(self.bytes, self.at + 2);
        Ok(())
    }
}

#[inline]
fn signed(bits: usize, size: u32) -> i32 {
    let bits = i32::try_from(bits).unwrap_or(0);
    if bits >> (size - 1) == 0 {
        bits - (1 << size) + 1
    } else {
        bits
    }
}

/// A Huffman table.
pub(super) struct Huffman {
    /// By the next [`LOOK`] bits: symbol and length of its code; length 0 for longer codes.
    short: Vec<(u8, u8)>,
    /// By the next [`LOOK`] bits: value, run and length of code and value together; length 0 if they do
    /// not fit.
    whole: Vec<(i16, u8, u8)>,
    /// Per length: first code beyond that length, left-aligned to 16 bits.
    beyond: [u32; 17],
    /// Per length: index of a symbol minus its code.
    offset: [i32; 17],
    symbols: Vec<u8>,
}

impl Huffman {
    /// From the number of codes of each length 1 to 16 and the symbols in order. Nothing if that is no
    /// code.
    pub(super) fn new(counts: &[u8; 16], symbols: &[u8]) -> Option<Self> {
        let mut table = Self {
            short: vec![(0, 0); 1 << LOOK],
            whole: vec![(0, 0, 0); 1 << LOOK],
            beyond: [0; 17],
            offset: [0; 17],
            symbols: symbols.to_vec(),
        };
        let (mut code, mut index) = (0u32, 0usize);
        for length in 1..=16usize {
            let count = usize::from(counts[length - 1]);
            table.offset[length] = i32::try_from(index).ok()? - i32::try_from(code).ok()?;
            for _ in 0..count {
                if code >= 1 << length {
                    return None;
                }
                if length <= LOOK {
                    let start = (code as usize) << (LOOK - length);
                    let entry = (*symbols.get(index)?, u8::try_from(length).ok()?);
                    table.short[start..start + (1 << (LOOK - length))].fill(entry);
                }
                code += 1;
                index += 1;
            }
            table.beyond[length] = code << (16 - length);
            code <<= 1;
        }
        for bits in 0..1usize << LOOK {
            let (symbol, length) = table.short[bits];
            let (run, size) = (symbol >> 4, symbol & 15);
            let total = usize::from(length) + usize::from(size);
            if length > 0 && size > 0 && total <= LOOK {
                let value = bits >> (LOOK - total) & ((1 << size) - 1);
                let value = i16::try_from(signed(value, u32::from(size))).ok()?;
                table.whole[bits] = (value, run, u8::try_from(total).ok()?);
            }
        }
        (index == symbols.len()).then_some(table)
    }

    /// The next symbol; bits must be filled.
    #[inline]
    fn symbol(&self, bits: &mut Bits<'_>) -> Result<u8, &'static str> {
        let (symbol, length) = self.short[bits.peek(10)];
        if length > 0 {
            bits.skip(u32::from(length));
            return Ok(symbol);
        }
        self.long(bits)
    }

    #[cold]
    fn long(&self, bits: &mut Bits<'_>) -> Result<u8, &'static str> {
        const BAD: &str = "a code that does not exist";
        let next = bits.peek(16);
        let length = (LOOK + 1..=16)
            .find(|&length| next < self.beyond[length] as usize)
            .ok_or(BAD)?;
        let code = i32::try_from(next >> (16 - length)).map_err(|_| BAD)?;
        let index = usize::try_from(code + self.offset[length]).map_err(|_| BAD)?;
        bits.skip(u32::try_from(length).map_err(|_| BAD)?);
        self.symbols.get(index).copied().ok_or(BAD)
    }

    /// The next difference of a block's mean.
    #[inline]
    pub(super) fn difference(&self, bits: &mut Bits<'_>) -> Result<i32, &'static str> {
        bits.fill();
        let size = self.symbol(bits)?;
        if size > 15 {
            return Err("a value that is too large");
        }
        Ok(bits.value(u32::from(size)))
    }

    /// The next coefficient: how many zeros come first, and its value; a value of 0 with a run of 15 is
    /// sixteen zeros, any other 0 ends the block.
    #[inline]
    pub(super) fn coefficient(&self, bits: &mut Bits<'_>) -> Result<(usize, i32), &'static str> {
        bits.fill();
        let (value, run, length) = self.whole[bits.peek(10)];
        if length > 0 {
            bits.skip(u32::from(length));
            return Ok((usize::from(run), i32::from(value)));
        }
        let symbol = self.symbol(bits)?;
        let value = bits.value(u32::from(symbol & 15));
        Ok((usize::from(symbol >> 4), value))
    }
}
