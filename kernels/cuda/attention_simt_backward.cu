// Attention backward in float32: the owners of attention_backward.cuh, each a warp alone, every operation IEEE.
//
// A warp owns a query, walks its keys and writes dQ; another owns a key, walks the queries that see it, heads of a
// group in order, and writes dK and dV; another an element of a broadcast bias's gradient. dQ is found relative to the
// reference delta and corrected: the exact one follows from the same walk, dQ = scale * (dR - (delta - reference) * P *
// cap_slope) K. Lanes share the columns, products are added over the lanes by butterflies, and
// a pair that is excluded is left out by a branch. Sums are taken 32 pairs at a time. Keys and values are read through
// the caches by every warp: simple before fast, as float32 is not what training runs in.
#include "cuda/attention_backward_bias.cuh"

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
  const float grad_lse = g.grad_lse.data ? row_of<float>(g.grad_lse, s.batch, head, s.query_row + query)[0] : 0.0f;
  RowStatistics row = {reference_of(lse, p.logit_scale), 1.0f,
                       row_of<float>(g.delta, s.batch, head, s.query_row + query)[0]};
  RowSum<Columns> grad_query, weighted_keys;
  Pair weights = {0, 0}, grads = {0, 0}, slope = {0, 0}, distances = {0, 0};
  const KeyRange seen = keys_of_query(p, s, query);
  const auto for_each_key = [&](auto take) {
    for (int key = seen.begin; key < seen.end; ++key) {
      LaneRow<Columns> of_key, value;
      of_key.load(p.key, s.batch, kv_head, s.key_row + key, p.head_dim);
      value.load(p.value, s.batch, kv_head, s.key_row + key, p.value_head_dim);
      const PairGrad of = pair_grad<float, true>(p, s, head, query, key, true, of_query.dot(of_key), 0.0f,
                                                 grad_output.dot(value), row);
      if (of.kept) take(of, of_key, key);
    }
  };
  if (is_huge(lse)) {
    float most = -attention_infinity;
    for_each_key([&](const PairGrad& of, const LaneRow<Columns>&, int) { most = fmaxf(most, of.score); });
    row.reference = most == -attention_infinity ? 0.0f : most;
  }
  for_each_key([&](const PairGrad& of, const LaneRow<Columns>& of_key, int key) {
    grad_query.add(of.grad_product, of_key);
    weighted_keys.add(of.weight * of.cap_slope, of_key);
    weights = weights + of.weight;
    grads = grads + of.grad_score;
    if (g.slope_parts) {
      const float away = distance(p, s, query, key);
      slope = slope + two_product(of.grad_score, -away);
      distances = distances + two_product(of.weight, away);
    }
  });
  const RowSums sums = {to_float(weights), to_float(grads), to_float(slope), to_float(distances)};
  const RowGrad of_row = grad_of_row(p, head, lse, grad_lse, row, sums);
  __syncwarp();  // every lane has read the reference delta, whose place the exact one takes
  if (lane_of_warp() == 0) write_row(g, s, head, query, row.reference, of_row);
  grad_query.flush();
  weighted_keys.flush();
  const float correction = row.delta - of_row.delta;
  if (correction != 0) grad_query.total.add(correction, weighted_keys.total);
  grad_query.total.store(g.grad_query, s.batch, head, s.query_row + query, p.head_dim, of_row.normaliser * p.scale);
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
  for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    Pair key_sum = {0, 0};
    for (int query = seeing.begin; query < seeing.end; ++query) {
      LaneRow<Columns> of_query, grad_output;
      of_query.load(p.query, s.batch, head, s.query_row + query, p.head_dim);
      grad_output.load(g.grad_output, s.batch, head, s.query_row + query, p.value_head_dim);
      const PairGrad of = pair_grad<float, true>(p, s, head, query, key, true, of_query.dot(of_key), 0.0f,
                                                 grad_output.dot(value), read_row(g, s, head, query));
      if (!of.kept) continue;
      grad_key.add(of.grad_product, of_query);
      grad_value.add(of.dropped_weight, grad_output);
      key_sum = key_sum + of.grad_score;
      if (g.whole_grad_bias && lane_of_warp() == 0)
        write_grad_bias<float>(g, s.batch, head, query, key, of.grad_score);
    }
    if (g.key_sums && lane_of_warp() == 0)
      g.key_sums[(s.batch * p.num_heads + head) * p.max_seqlen_k + key] = to_float(key_sum);
  }
  grad_key.flush();
  grad_value.flush();
  grad_key.total.store(g.grad_key, s.batch, kv_head, s.key_row + key, p.head_dim, p.scale);
  grad_value.total.store(g.grad_value, s.batch, kv_head, s.key_row + key, p.value_head_dim, 1.0f);
}

template <int Columns>
__global__ void __launch_bounds__(warps_of_block* warp_size)
    attention_simt_grad_bias_kernel(const __grid_constant__ AttentionGradParams g) {
  const AttentionParams& p = g.problem;
  int64_t number = static_cast<int64_t>(blockIdx.x) * warps_of_block + threadIdx.x / warp_size;
  const int key = static_cast<int>(number % p.max_seqlen_k);
  number /= p.max_seqlen_k;
  const int query = static_cast<int>(number % p.max_seqlen_q);
  number /= p.max_seqlen_q;
  if (number >= static_cast<int64_t>(g.grad_bias_batch) * g.grad_bias_heads) return;
  const BiasPlane plane(g, number);
  Pair sum = {0, 0};
  for (int64_t batch = plane.batch; batch < plane.batch_end; ++batch) {
    const AttentionSequence s = sequence_of(p, batch);
    if (query >= s.seqlen_q) continue;
    const KeyRange seen = keys_of_query(p, s, query);
    if (key < seen.begin || key >= seen.end) continue;
    for (int head = plane.head; head < plane.head_end; ++head) {
      const int kv_head = head / (p.num_heads / p.num_kv_heads);
      LaneRow<Columns> of_query, grad_output, of_key, value;
      of_query.load(p.query, batch, head, s.query_row + query, p.head_dim);
      grad_output.load(g.grad_output, batch, head, s.query_row + query, p.value_head_dim);
      of_key.load(p.key, batch, kv_head, s.key_row + key, p.head_dim);
      value.load(p.value, batch, kv_head, s.key_row + key, p.value_head_dim);
      const PairGrad of = pair_grad<float, true>(p, s, head, query, key, true, of_query.dot(of_key), 0.0f,
                                                 grad_output.dot(value), read_row(g, s, head, query));
      if (of.kept) sum = sum + of.grad_score;
    }
  }
  if (lane_of_warp() == 0) write_grad_bias<float>(g, plane.batch, plane.head, query, key, to_float(sum));
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
  error = launch(attention_simt_grad_key_kernel<Columns>, grid(of_keys), block, 0, stream, g);
  if (error != cudaSuccess || !g.grad_bias.data || g.whole_grad_bias) return error;
  const int64_t planes = static_cast<int64_t>(g.grad_bias_batch) * g.grad_bias_heads;
  const int64_t of_biases = blocks(planes * p.max_seqlen_q * p.max_seqlen_k, warps_of_block);
  if (of_biases > most_blocks) return cudaErrorInvalidConfiguration;
  return launch(attention_simt_grad_bias_kernel<Columns>, grid(of_biases), block, 0, stream, g);
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
