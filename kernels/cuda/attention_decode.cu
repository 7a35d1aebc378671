// decode_attention on a GPU: launchers, and the writing of new keys and values into their caches.
//
// The kernels are in attention_decode_mma.cuh (float16, bfloat16) and attention_decode_simt.cuh (float32), what they
// share in attention_decode_parts.cuh.
#include "cuda/attention_decode.cuh"

#include "cuda/attention_alignment.cuh"
#include "cuda/attention_decode_mma.cuh"
#include "cuda/attention_decode_simt.cuh"

namespace transfuse::cuda {

namespace {

// ---- append ----

constexpr int append_threads = 128;

// A thread per vector of a new row: keys along y 0, values along y 1.
template <class T>
__global__ void __launch_bounds__(append_threads)
    attention_append_kernel(const __grid_constant__ DecodeAppendParams a) {
  const int which = static_cast<int>(blockIdx.y), columns = a.columns[which];
  const int64_t vectors = (columns + width<T> - 1) / width<T>;
  int64_t place = static_cast<int64_t>(blockIdx.x) * append_threads + threadIdx.x;
  const int column = static_cast<int>(place % vectors) * width<T>;
  place /= vectors;
  const int64_t token = place % a.cache.num_new;
  place /= a.cache.num_new;
  const int64_t head = place % a.num_kv_heads, batch = place / a.num_kv_heads;
  if (batch >= a.batch) return;
  const int64_t key = clamped(integer_at(a.cache.lengths, batch), 0, a.cache.capacity) + token;
  if (key >= a.cache.capacity) return;
  int64_t block = batch, row = key;
  if (a.cache.table) {
    const int page = static_cast<int>(key / a.cache.block_size);
    block = block_in_table(a.cache, batch, page);
    row = key - static_cast<int64_t>(page) * a.cache.block_size;
  }
  if (block < 0 || block >= a.cache.num_blocks) return;  // no such block: nothing else is written instead
  const AttentionTensor& from = a.sources[which];
  const AttentionOutput& to = a.targets[which];
  const T* source = row_of<T>(from, batch, head, token);
  T* target = row_of<T>(to, block, head, row);
  if (a.whole[which]) {
    *reinterpret_cast<uint4*>(target + column) = *reinterpret_cast<const uint4*>(source + column);
    return;
  }
#pragma unroll
  for (int j = 0; j < width<T>; ++j)
    if (column + j < columns) target[(column + j) * a.target_cols[which]] = source[(column + j) * from.col];
}

template <class T>
cudaError_t append_rows(DecodeAppendParams a, cudaStream_t stream) {
  const int64_t rows = a.batch * a.num_kv_heads * a.cache.num_new;
  int64_t blocks = 0;
  for (int i = 0; i < 2; ++i) {
    const AttentionOutput& to = a.targets[i];
    a.whole[i] = whole_rows<T>(a.sources[i]) && a.columns[i] % width<T> == 0 &&
        whole_rows<T>(AttentionTensor{to.data, to.batch, to.head, to.row, a.target_cols[i]});
    const int64_t threads = rows * ((a.columns[i] + width<T> - 1) / width<T>);
    const int64_t needed = (threads + append_threads - 1) / append_threads;
    blocks = needed > blocks ? needed : blocks;
  }
  if (blocks > most_blocks) return cudaErrorInvalidConfiguration;
  return launch(attention_append_kernel<T>, dim3(static_cast<unsigned>(blocks), blocks ? 2 : 0), dim3(append_threads),
                0, stream, a);
}

// ---- forward ----

template <class T>
DecodeParams prepared(DecodeParams d) {
  AttentionParams& p = d.problem;
  p.bottom_right = true;
  p.window_right = 0;
  p.excludes = p.bias.data || p.max_seqlen_q > 1;  // one query sees all that is read, but for a bias
  p.whole_query = whole_rows<T>(p.query);
  p.whole_key = whole_rows<T>(p.key);
  p.whole_value = whole_rows<T>(p.value);
  p.bias_pairs = aligned_pairs(p.bias, p.bias_in_float ? 4 : static_cast<int64_t>(sizeof(T)));
  return d;
}

int64_t rows_of_problem(const AttentionParams& p) {
  return static_cast<int64_t>(p.num_heads / p.num_kv_heads) * p.max_seqlen_q;
}

template <class T, class Policy>
cudaError_t launch_decode(void (*kernel)(DecodeParams), const DecodeParams& params, cudaStream_t stream) {
  static_assert(decode_most_tile_rows % Policy::rows == 0, "slices are whole tiles");
  DecodeParams d = prepared<T>(params);
  const int64_t rows = rows_of_problem(d.problem), groups = d.problem.num_sequences * d.problem.num_kv_heads;
  for (int64_t first = 0; first < rows; first += params.slice_rows) {
    d.slice_first = static_cast<int>(first);
    d.slice_rows = static_cast<int>(rows - first < params.slice_rows ? rows - first : params.slice_rows);
    const int64_t tiles = (d.slice_rows + Policy::rows - 1) / Policy::rows;
    if (groups * tiles * d.parts > most_blocks || groups * d.slice_rows > most_blocks)
      return cudaErrorInvalidConfiguration;
    cudaError_t error = launch(kernel, dim3(static_cast<unsigned>(groups * tiles * d.parts)), dim3(decode_threads),
                               Policy::shared_bytes, stream, d);
    if (error == cudaSuccess && d.parts > 1)
      error = launch(attention_decode_fold_kernel<T>, dim3(static_cast<unsigned>(groups * d.slice_rows)),
                     dim3(decode_threads), 0, stream, d);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template <class T, int HeadDim>
cudaError_t launch_tensor_cores(const DecodeParams& d, cudaStream_t stream) {
  using Policy = DecodePolicy<T, HeadDim>;
  return launch_decode<T, Policy>(attention_decode_kernel<Policy>, d, stream);
}
template <int HeadDim>
cudaError_t launch_simt(const DecodeParams& d, cudaStream_t stream) {
  using Policy = DecodeSimtPolicy<HeadDim>;
  return launch_decode<float, Policy>(attention_decode_simt_kernel<Policy>, d, stream);
}

template <class T>
cudaError_t decode_16_bits(const DecodeParams& d, int widest, cudaStream_t stream) {
  if (widest <= 64) return launch_tensor_cores<T, 64>(d, stream);
  if (widest <= 128) return launch_tensor_cores<T, 128>(d, stream);
  return launch_tensor_cores<T, decode_widest_head_dim>(d, stream);
}

}  // namespace

void attention_decode_cut(DecodeParams& d) {
  const AttentionParams& p = d.problem;
  // Not the parts of the longest entry: where that one's are longer than the shortest, a shorter entry may have more.
  const int shortest = (d.cache.capacity + decode_part_keys - 1) / decode_part_keys;
  d.parts = shortest < 1 ? 1 : shortest < decode_most_parts ? shortest : decode_most_parts;
  d.partial_columns = (p.value_head_dim + 3) / 4 * 4;
  d.slice_first = 0;
  d.slice_rows = p.num_kv_heads ? static_cast<int>(rows_of_problem(p)) : 0;
  if (d.parts == 1) return;
  const int64_t of_row = p.num_sequences * p.num_kv_heads * d.parts * (d.partial_columns + decode_stats) *
      static_cast<int64_t>(sizeof(float));
  const int64_t fit = of_row ? decode_most_scratch / of_row / decode_most_tile_rows : 0;
  const int64_t most = (fit > 1 ? fit : 1) * decode_most_tile_rows;
  if (d.slice_rows > most) d.slice_rows = static_cast<int>(most);
}

cudaError_t attention_decode_forward(const DecodeParams& d, DType dtype, cudaStream_t stream) {
  const AttentionParams& p = d.problem;
  if (p.num_sequences == 0 || p.num_heads == 0 || p.max_seqlen_q == 0) return cudaSuccess;
  const int widest = p.head_dim > p.value_head_dim ? p.head_dim : p.value_head_dim;
  if (widest > decode_widest_head_dim) return cudaErrorNotSupported;
  switch (dtype) {
    case DType::f32:
      return widest <= 128 ? launch_simt<128>(d, stream) : launch_simt<decode_widest_head_dim>(d, stream);
    case DType::f16:
      return decode_16_bits<f16>(d, widest, stream);
    case DType::bf16:
      return decode_16_bits<bf16>(d, widest, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t attention_decode_append(const DecodeAppendParams& a, DType dtype, cudaStream_t stream) {
  if (a.batch == 0 || a.num_kv_heads == 0 || a.cache.num_new == 0) return cudaSuccess;
  return with_type(dtype, [&](auto element) { return append_rows<decltype(element)>(a, stream); });
}

}  // namespace transfuse::cuda
