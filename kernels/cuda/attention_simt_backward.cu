// Attention backward in float32: the owners of attention_backward.cuh, each a warp alone, every operation IEEE.
//
// A warp owns a query, walks its keys and writes dQ; another owns a key, walks the queries that see it, heads of a
// group in order, and writes dK and dV. Lanes share the columns, products are added over the lanes by butterflies, and
// a pair that is excluded is left out by a branch. Sums are taken 32 pairs at a time. Keys and values are read through
// the caches by every warp: simple before fast, as float32 is not what training runs in.
#include "cuda/attention_backward.cuh"

namespace transfuse::cuda {

namespace {

constexpr int warps_of_block = 4, pairs_of_sum = 32;

// One row of a tensor, lane by lane: column 32 * c + lane at c.
template <int Columns>
struct LaneRow {
  float x[Columns];

  __device__ __forceinline__ void load(const AttentionTensor& t, int64_t batch, int64_t head, int64_t row,
                                       int columns) {
    const float* from = row_of<float>(t, batch, head, row);
#pragma unroll
    for (int c = 0; c < Columns; ++c) {
      const int column = warp_size * c + lane_of_warp();
      x[c] = column < columns ? from[column * t.col] : 0.0f;
    }
  }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int c = 0; c < Columns; ++c) x[c] = 0;
  }
  __device__ __forceinline__ float dot(const LaneRow& other) const {
    float sum = 0;
#pragma unroll
    for (int c = 0; c < Columns; ++c) sum = fmaf(x[c], other.x[c], sum);
    return reduce_lanes<warp_size>(sum, Add{});
  }
  __device__ __forceinline__ void add(float factor, const LaneRow& other) {
#pragma unroll
    for (int c = 0; c < Columns; ++c) x[c] = fmaf(factor, other.x[c], x[c]);
  }
  __device__ __forceinline__ void store(const AttentionOutput& t, int64_t batch, int64_t head, int64_t row, int columns,
                                        float factor) const {
    float* to = row_of<float>(t, batch, head, row);
#pragma unroll
    for (int c = 0; c < Columns; ++c) {
      const int column = warp_size * c + lane_of_warp();
      if (column < columns) to[column] = x[c] * factor;
    }
  }
};

// A sum of rows in two levels.
template <int Columns>
struct RowSum {
  LaneRow<Columns> total, part;
  int pairs = 0;

  __device__ __forceinline__ RowSum() {
    total.clear();
    part.clear();
  }
  __device__ __forceinline__ void add(float factor, const LaneRow<Columns>& row) {
    part.add(factor, row);
    if (++pairs % pairs_of_sum == 0) flush();
  }
  __device__ __forceinline__ void flush() {
    total.add(1.0f, part);
    part.clear();
  }
};

// The warp's own number among all of the grid's, and what lies behind it: row of `length`, then head, then sequence.
struct OwnedRow {
  int row, head;
  int64_t sequence;

  __device__ __forceinline__ OwnedRow(int length, int heads) {
    int64_t number = static_cast<int64_t>(blockIdx.x) * warps_of_block + threadIdx.x / warp_size;
    row = static_cast<int>(number % length);
    number /= length;
    head = static_cast<int>(number % heads);
    sequence = number / heads;
  }
};

template <int Columns>
__global__ void __launch_bounds__(warps_of_block* warp_size)
    attention_simt_grad_query_kernel(const __grid_constant__ AttentionGradParams g) {
  const AttentionParams& p = g.problem;
  const OwnedRow owned(p.max_seqlen_q, p.num_heads);
  if (owned.sequence >= p.num_sequences) return;
  const AttentionSequence s = sequence_of(p, owned.sequence);
  if (owned.row >= s.seqlen_q) return;
  const int query = owned.row, head = owned.head, kv_head = head / (p.num_heads / p.num_kv_heads);
  LaneRow<Columns> of_query, grad_output;
  of_query.load(p.query, s.batch, head, s.query_row + query, p.head_dim);
  grad_output.load(g.grad_output, s.batch, head, s.query_row + query, p.value_head_dim);
  const float lse = row_of<float>(g.lse, s.batch, head, s.query_row + query)[0];
  const float delta = row_of<float>(g.delta, s.batch, head, s.query_row + query)[0];
  float* grad_scores = g.grad_scores
      ? g.grad_scores + ((s.batch * p.num_heads + head) * p.max_seqlen_q + query) * p.max_seqlen_k
      : nullptr;
  RowSum<Columns> grad_query;
  const KeyRange seen = keys_of_query(p, s, query);
  for (int key = seen.begin; key < seen.end; ++key) {
    LaneRow<Columns> of_key, value;
    of_key.load(p.key, s.batch, kv_head, s.key_row + key, p.head_dim);
    value.load(p.value, s.batch, kv_head, s.key_row + key, p.value_head_dim);
    const PairGrad of = pair_grad<float, true>(p, s, head, query, key, true, of_query.dot(of_key), 0.0f,
                                               grad_output.dot(value), lse, delta);
    if (!of.kept) continue;
    grad_query.add(of.grad_product, of_key);
    if (grad_scores && lane_of_warp() == 0) grad_scores[key] = of.grad_score;
  }
  grad_query.flush();
  grad_query.total.store(g.grad_query, s.batch, head, s.query_row + query, p.head_dim, p.scale);
}

template <int Columns>
__global__ void __launch_bounds__(warps_of_block* warp_size)
    attention_simt_grad_key_kernel(const __grid_constant__ AttentionGradParams g) {
  const AttentionParams& p = g.problem;
  const OwnedRow owned(p.max_seqlen_k, p.num_kv_heads);
  if (owned.sequence >= p.num_sequences) return;
  const AttentionSequence s = sequence_of(p, owned.sequence);
  if (owned.row >= s.seqlen_k) return;
  const int key = owned.row, kv_head = owned.head, group = p.num_heads / p.num_kv_heads;
  LaneRow<Columns> of_key, value;
  of_key.load(p.key, s.batch, kv_head, s.key_row + key, p.head_dim);
  value.load(p.value, s.batch, kv_head, s.key_row + key, p.value_head_dim);
  RowSum<Columns> grad_key, grad_value;
  const KeyRange seeing = queries_of_keys(p, s, key, 1);
  for (int head = kv_head * group; head < (kv_head + 1) * group; ++head)
    for (int query = seeing.begin; query < seeing.end; ++query) {
      LaneRow<Columns> of_query, grad_output;
      of_query.load(p.query, s.batch, head, s.query_row + query, p.head_dim);
      grad_output.load(g.grad_output, s.batch, head, s.query_row + query, p.value_head_dim);
      const PairGrad of = pair_grad<float, true>(p, s, head, query, key, true, of_query.dot(of_key), 0.0f,
                                                 grad_output.dot(value),
                                                 row_of<float>(g.lse, s.batch, head, s.query_row + query)[0],
                                                 row_of<float>(g.delta, s.batch, head, s.query_row + query)[0]);
      if (!of.kept) continue;
      grad_key.add(of.grad_product, of_query);
      grad_value.add(of.dropped_weight, grad_output);
    }
  grad_key.flush();
  grad_value.flush();
  grad_key.total.store(g.grad_key, s.batch, kv_head, s.key_row + key, p.head_dim, p.scale);
  grad_value.total.store(g.grad_value, s.batch, kv_head, s.key_row + key, p.value_head_dim, 1.0f);
}

template <int Columns>
cudaError_t launch_simt(const AttentionGradParams& g, cudaStream_t stream) {
  const AttentionParams& p = g.problem;
  const auto blocks = [](int64_t rows, int rows_of_block) { return (rows + rows_of_block - 1) / rows_of_block; };
  const int64_t heads = p.num_sequences * p.num_heads, delta_tiles = blocks(p.max_seqlen_q, delta_rows);
  const int64_t of_queries = blocks(heads * p.max_seqlen_q, warps_of_block);
  const int64_t of_keys = blocks(p.num_sequences * p.num_kv_heads * p.max_seqlen_k, warps_of_block);
  if (heads * delta_tiles > most_blocks || of_queries > most_blocks || of_keys > most_blocks)
    return cudaErrorInvalidConfiguration;
  const auto grid = [](int64_t count) { return dim3(static_cast<unsigned>(count)); };
  const dim3 block(warps_of_block * warp_size);
  cudaError_t error =
      launch(attention_delta_kernel<float>, grid(heads * delta_tiles), dim3(delta_rows * warp_size), 0, stream, g);
  if (error != cudaSuccess) return error;
  error = launch(attention_simt_grad_query_kernel<Columns>, grid(of_queries), block, 0, stream, g);
  if (error != cudaSuccess) return error;
  return launch(attention_simt_grad_key_kernel<Columns>, grid(of_keys), block, 0, stream, g);
}

}  // namespace

cudaError_t attention_backward_f32(const AttentionGradParams& g, cudaStream_t stream) {
  const AttentionParams& p = g.problem;
  const int widest = p.head_dim > p.value_head_dim ? p.head_dim : p.value_head_dim;
  if (widest <= 64) return launch_simt<2>(g, stream);
  if (widest <= 128) return launch_simt<4>(g, stream);
  return widest <= 256 ? launch_simt<8>(g, stream) : cudaErrorNotSupported;
}

}  // namespace transfuse::cuda
