//! The calls of a decoding step on the CPU: what the decoder makes of tensors that lie on a GPU, on the same tables.

use arete_model::cuda::plan::{AttentionShape, Format};
use arete_model::cuda::{Absmax, AttentionTables, Packed as PackedTensors, attend, nf4_rows};
use tch::{Device, Kind, Tensor};

use crate::attention::{Case, SHAPES, segments};
use crate::nf4_rows::assert_product;
use crate::numbers::{Goldens, Random, encoded, floats, numbers};
use crate::packed::{Packed, Scales};

fn kind(format: Format) -> Kind {
    match format {
        Format::F32 => Kind::Float,
        Format::BF16 => Kind::BFloat16,
        Format::F16 => Kind::Half,
    }
}

fn tensor(values: &[f32], width: u32, format: Format) -> Tensor {
    Tensor::from_slice(values).view([-1, i64::from(width)]).to_kind(kind(format))
}

fn values_of(tensor: &Tensor) -> Vec<f32> {
    Vec::try_from(tensor.to_kind(Kind::Float).view([-1])).expect("numbers")
}

#[test]
fn attention_on_the_cpu_equals_softmax() {
    for (i, &shape) in SHAPES.iter().enumerate() {
        for format in Format::ALL {
            let case = Case::new(shape, segments(), format, 60 + i as u64);
            let (table, spans) = case.tables();
            let tables =
                AttentionTables::new(&table, &spans, shape, Device::Cpu).expect("they fit");
            let AttentionShape { heads, kv_heads, head_size, .. } = shape;
            let q = tensor(&case.q, heads * head_size, format);
            let keys = tensor(&case.keys, kv_heads * head_size, format);
            let values = tensor(&case.values, kv_heads * head_size, format);
            let out = attend(&q, &keys, &values, &tables).expect("they fit");
            assert_eq!((out.size(), out.kind()), (q.size(), q.kind()));
            case.assert_close(&format!("{format:?}, {shape:?}"), &values_of(&out), format);
        }
    }
}

#[test]
fn tables_and_tensors_that_do_not_fit_are_refused() {
    let shape = AttentionShape { heads: 4, kv_heads: 2, head_size: 64, window: 0 };
    let message = |segments: &[[i64; 5]], spans: &[[i64; 2]], shape| {
        AttentionTables::new(segments, spans, shape, Device::Cpu).expect_err("refused").to_string()
    };
    let short = message(&[[0, 1, 5, 0, 1]], &[[0, 5]], shape);
    assert!(short.contains("segment 0: row 0, 1 rows from position 5, 5 keys"), "{short}");
    let absent = message(&[[0, 1, 0, 0, 1], [1, 1, 0, 1, 1]], &[[0, 1]], shape);
    assert!(absent.contains("segment 1 with spans that are not there"), "{absent}");
    let heads = message(&[], &[], AttentionShape { kv_heads: 3, ..shape });
    assert!(heads.contains("4 over 3 of 64"), "{heads}");

    let tables =
        AttentionTables::new(&[[0, 1, 5, 0, 1]], &[[10, 6]], shape, Device::Cpu).expect("they fit");
    let zeros = |rows: i64, width: i64| Tensor::zeros([rows, width], (Kind::Float, Device::Cpu));
    let (q, cache) = (zeros(1, 256), zeros(16, 128));
    assert_eq!(attend(&q, &cache, &cache, &tables).expect("they fit").size(), [1, 256]);
    let refused = |q: &Tensor, keys: &Tensor| {
        attend(q, keys, &cache, &tables).expect_err("refused").to_string()
    };
    assert!(refused(&q, &zeros(15, 128)).contains("keys"), "slot 15 is used");
    assert!(refused(&zeros(2, 256), &cache).contains('q'));
    assert!(refused(&q, &cache.to_kind(Kind::Half)).contains("Half"));
}

#[test]
fn packed_products_on_the_cpu_round_weights_once() {
    let goldens = Goldens::read("nf4.safetensors");
    let (codebook, map) = (goldens.get("codebook"), goldens.get("nested_codebook"));
    let mut random = Random(8);
    for double in [false, true] {
        let packed = Packed::random(&codebook, &map, 300, 192, 64, double, &mut random);
        let bytes = |bytes: &[u8]| Tensor::from_slice(bytes);
        let (codes, codebook) =
            (bytes(&packed.codes), Tensor::from_slice(&floats(&packed.codebook)));
        let parts: Vec<Tensor> = match &packed.scales {
            Scales::Single(absmax) => vec![Tensor::from_slice(&floats(absmax))],
            Scales::Double([codes, map, nested]) => {
                let floats = |bytes: &[u8]| Tensor::from_slice(&floats(bytes));
                vec![bytes(codes), floats(map), floats(nested)]
            }
        };
        let absmax = match &parts[..] {
            [absmax] => Absmax::Single(absmax),
            [codes, map, nested] => Absmax::Double { codes, map, nested },
            _ => unreachable!("one part or three"),
        };
        let weight = PackedTensors {
            codes: &codes,
            codebook: &codebook,
            absmax,
            outputs: 300,
            inputs: 192,
            block_size: 64,
        };
        for format in Format::ALL {
            let weights = numbers(&encoded(&packed.weights(), format), format);
            let x: Vec<f32> = (0..5 * 192).map(|_| random.number()).collect();
            let x = numbers(&encoded(&x, format), format);
            let y = nf4_rows(&tensor(&x, 192, format), &weight).expect("they fit");
            let name = format!("{format:?}, double {double}");
            assert_product(&name, &values_of(&y), &x, &weights, 192, format);
        }
    }
}
