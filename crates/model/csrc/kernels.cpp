// See kernels.h. Compiled once for each instruction set, with ARETE_KERNELS naming the table and its own -march flags.
#include "kernels.h"

#include "kernels/attention.h"
#include "kernels/few_rows.h"
#include "kernels/nf4.h"
#include "kernels/norms.h"
#include "kernels/product.h"
#include "kernels/tiles.h"
#include "kernels/vocabulary.h"

namespace arete {
namespace {

const Kernels table = {
    ARETE_NAME,
    {rms_norm<float>, rms_norm<bf16>},
    {rms_norm_backward<float>, rms_norm_backward<bf16>},
    {rope<float>, rope<bf16>},
    {attention<float>, attention<bf16>},
    {attention_backward<float>, attention_backward<bf16>},
    {swiglu<float>, swiglu<bf16>},
    {swiglu_backward<float>, swiglu_backward<bf16>},
    {token_logprob<float>, token_logprob<bf16>},
    {sample<float>, sample<bf16>},
    {nf4_quantize<float>, nf4_quantize<bf16>},
    {nf4_dequantize<float>, nf4_dequantize<bf16>},
    {nf4_matmul<float>, nf4_matmul<bf16>},
    {bf16_matmul<float>, bf16_matmul<bf16>},
#ifdef __AMX_BF16__
    {product<float>, product_of_tiles<AmxTiles>},
#else
    {product<float>, product<bf16>},
#endif
    kPanel,
    product_of_tiles<EmulatedTiles>,
};

}  // namespace

const Kernels* ARETE_KERNELS() { return &table; }

}  // namespace arete
