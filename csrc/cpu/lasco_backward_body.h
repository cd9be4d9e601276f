// Forward and backward of the training kernels on F32; included by lasco_backward_<isa>.cpp after
// lasco_backward_tile.h.

namespace {

constexpr float kRootHalf = 0.707106781f, kRootTwoPi = 0.398942280f;

struct BlockWeights {
  const float *qkv, *qkv_bias, *proj, *proj_bias, *up, *up_bias, *down, *down_bias, *norm1, *norm1_bias, *norm2,
      *norm2_bias;
};

BlockWeights block_weights(const float* const* weights, int64_t block) {
  const float* const* w = weights + 3 + block * kWeightsPerBlock;
  return {w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7], w[8], w[9], w[10], w[11]};
}

CSIKERNELS_INLINE F32 gelu_slope(F32 a) {
  const F32 density = exp(broadcast(-0.5f) * a * a) * broadcast(kRootTwoPi);
  return fma(a, density, fma(broadcast(0.5f), erf(a * broadcast(kRootHalf)), broadcast(0.5f)));
}

// dp [keys][queries] <- gradient before the softmax and the scale.
void softmax_backward(float* dp, const float* p, int64_t keys, int64_t columns, float scale) {
  for (int64_t j = 0; j < columns; j += F32::lanes) {
    F32 along = broadcast(0.0f);
    for (int64_t k = 0; k < keys; ++k) along = fma(load(dp + k * columns + j), load(p + k * columns + j), along);
    for (int64_t k = 0; k < keys; ++k) {
      const F32 weighted = load(p + k * columns + j) * broadcast(scale);
      store(dp + k * columns + j, (load(dp + k * columns + j) - along) * weighted);
    }
  }
}

float attention_scale(const TrainShape& z) { return 1.0f / __builtin_sqrtf(static_cast<float>(z.width / z.heads)); }

// qkv [3 width][T] -> p [heads][keys][T], context [width][T]; padded keys take no part.
void attention(const TrainShape& z, const float* qkv, float* p, float* context) {
  const int64_t t = padded16(z.tokens), depth = z.width / z.heads;
  for (int64_t head = 0; head < z.heads; ++head) {
    const float *q = qkv + head * depth * t, *k = q + z.width * t, *v = k + z.width * t;
    float* own = p + head * z.tokens * t;
    multiply(columns_of(k, t), q, z.tokens, depth, t, Stored{own, t}, ahead_in(own, t));
    softmax(own, t, z.tokens, t, attention_scale(z), Stored{own, t});
    multiply(rows_of(v, t), own, depth, z.tokens, t, Stored{context + head * depth * t, t});
  }
}

// d_context [width][T] -> d_qkv [3 width][T]; scratch of 3 T^2.
void attention_backward(const TrainShape& z, const float* qkv, const float* p, const float* d_context, float* d_qkv,
                        float* scratch) {
  const int64_t t = padded16(z.tokens), depth = z.width / z.heads;
  float *ds = scratch, *ds_turned = ds + t * t, *p_turned = ds_turned + t * t;
  for (int64_t head = 0; head < z.heads; ++head) {
    const int64_t first = head * depth * t;
    const float *q = qkv + first, *k = q + z.width * t, *v = k + z.width * t;
    const float *own = p + head * z.tokens * t, *dc = d_context + first;
    float *dq = d_qkv + first, *dk = dq + z.width * t, *dv = dk + z.width * t;
    multiply(columns_of(v, t), dc, z.tokens, depth, t, Stored{ds, t});
    softmax_backward(ds, own, z.tokens, t, attention_scale(z));
    multiply(rows_of(k, t), ds, depth, z.tokens, t, Stored{dq, t});
    turn(ds, t, z.tokens, z.tokens, ds_turned, t, t);
    multiply(rows_of(q, t), ds_turned, depth, z.tokens, t, Stored{dk, t});
    turn(own, t, z.tokens, z.tokens, p_turned, t, t);
    multiply(rows_of(dc, t), p_turned, depth, z.tokens, t, Stored{dv, t});
  }
}

// v [width][T] -> x + W_down act(W_up v + b) + b in out, which may be x. gelu keeps its argument and needs a scratch.
void feed_forward(const TrainShape& z, const BlockWeights& w, const float* v, const float* x, float* active,
                  float* scratch, float* out, const Places& next) {
  const int64_t t = padded16(z.tokens), ff = z.feedforward;
  const float* hidden = active;
  if (z.gelu) {
    multiply(rows_of(w.up, z.width), v, ff, z.width, t, WithBias{active, t, w.up_bias}, ahead_in(active, t));
    for (int64_t i = 0; i < ff * t; i += F32::lanes) store(scratch + i, gelu(load(active + i)));
    hidden = scratch;
  } else {
    multiply(rows_of(w.up, z.width), v, ff, z.width, t, WithBiasRelu{active, t, w.up_bias}, ahead_in(active, t));
  }
  multiply(rows_of(w.down, ff), hidden, z.width, ff, t, WithBiasAndRest{out, t, w.down_bias, x}, next);
}

}  // namespace

void train_forward(const TrainNetwork& network, const float* h, float* kept, int64_t block_rows, float* y,
                   const float* const* soon, float* scratch) {
  const TrainShape& z = network.shape;
  const Kept at = kept_rows(z);
  const int64_t t = padded16(z.tokens), d = z.width, last = weight_count(z) - 2;
  float *turned = scratch, *out = turned + padded16(z.features) * t, *x = out + padded16(z.features) * t,
        *sum = x + d * t, *v = sum + d * t, *hidden = v + d * t;
  turn(h, z.features, z.tokens, z.features, turned, t, t);
  float* const start = z.norm_first ? x : kept + at.first;
  multiply(rows_of(network.weights[0], z.features), turned, d, z.features, t, WithRest{start, t, network.position});
  const float* in = start;  // the residual stream
  for (int64_t block = 0; block < z.layers; ++block) {
    const BlockWeights w = block_weights(network.weights, block);
    float* own = kept + (at.blocks + block * block_rows) * t;
    float *qkv = own, *p = own + at.p * t, *context = own + at.context * t, *active = own + at.active * t;
    float *normal1 = own + at.normal1 * t, *rstd1 = own + at.rstd1 * t;
    float *normal2 = own + at.normal2 * t, *rstd2 = own + at.rstd2 * t;
    const bool bottom = block == 0;  // where the caller's memory is fetched
    const float* after = z.norm_first ? own + at.block * t : normal2;
    const Places next{{after, bottom ? soon[0] : after, bottom ? soon[1] : after, bottom ? soon[2] : after,
                       bottom ? soon[3] : after, bottom ? soon[4] : after, after, after}};
    if (z.norm_first) {
      layer_norm(x, t, d, t, z.eps, rstd1, Normalised{normal1, v, t, w.norm1, w.norm1_bias});
      multiply(rows_of(w.qkv, d), v, 3 * d, d, t, WithBias{qkv, t, w.qkv_bias}, ahead_in(qkv, t));
      attention(z, qkv, p, context);
      multiply(rows_of(w.proj, d), context, d, d, t, WithBiasAndRest{x, t, w.proj_bias, x}, ahead_of(normal2, d));
      layer_norm(x, t, d, t, z.eps, rstd2, Normalised{normal2, v, t, w.norm2, w.norm2_bias});
      feed_forward(z, w, v, x, active, hidden, x, next);
    } else {
      multiply(rows_of(w.qkv, d), in, 3 * d, d, t, WithBias{qkv, t, w.qkv_bias}, ahead_in(qkv, t));
      attention(z, qkv, p, context);
      multiply(rows_of(w.proj, d), context, d, d, t, WithBiasAndRest{sum, t, w.proj_bias, in}, ahead_of(normal1, d));
      layer_norm(sum, t, d, t, z.eps, rstd1, Normalised{normal1, v, t, w.norm1, w.norm1_bias});
      feed_forward(z, w, v, v, active, hidden, sum, next);
      layer_norm(sum, t, d, t, z.eps, rstd2, Normalised{normal2, x, t, w.norm2, w.norm2_bias});
      in = x;
    }
  }
  if (z.final_norm) {
    const float* const* w = network.weights + last - 2;
    layer_norm(in, t, d, t, z.eps, kept + at.rstd * t, Normalised{kept + at.normal * t, v, t, w[0], w[1]});
    in = v;
  } else if (z.norm_first) {
    for (int64_t i = 0; i < d * t; i += F32::lanes) store(kept + at.last * t + i, load(x + i));
  }
  multiply(rows_of(network.weights[last], d), in, z.features, d, t, WithBias{out, t, network.weights[last + 1]});
  turn(out, t, z.features, z.tokens, y, z.features, z.features);
}

namespace {

// Where a weight product finds its right operand: kept rows, or normalised values and what the LayerNorm multiplied.
struct Source {
  int64_t row;
  const float *weight, *bias;  // null for rows that are taken as they are
};

// One call of train_backward: the buffers of each sample, `stride` apart, and the steps on all of them.
struct Backward {
  const TrainNetwork& network;
  const TrainShape& z;
  const TrainBatch& batch;
  float* const* sums;
  int64_t t, d, stride;
  float *g, *inner, *wide, *turned, *shared;  // [width], [width], [widest] rows of t; [t][widest]; not per sample

  Backward(const TrainNetwork& net, const TrainBatch& samples, float* const* weight_sums, float* scratch)
      : network(net), z(net.shape), batch(samples), sums(weight_sums), t(padded16(z.tokens)), d(z.width) {
    g = scratch;
    inner = g + d * t;
    wide = inner + d * t;
    turned = wide + widest(z) * t;
    stride = t * (2 * d + widest(z) + padded16(widest(z)));
    shared = scratch + kTrainSamples * stride;
  }

  // What was computed into `inner` becomes the gradient.
  void swap() {
    float* const other = g;
    g = inner;
    inner = other;
  }

  const float* kept(int64_t sample, int64_t row) const { return batch.kept[sample] + row * t; }

  float* sum_of(int64_t index) const { return sums == nullptr ? nullptr : sums[index]; }

  // Weight `index` and the bias after it: sums of dY X^T and of dY. dY [rows][T] of each sample lies in dy.
  void add_weight_gradients(int64_t index, const float* dy, int64_t rows, int64_t columns, const Source& source) {
    if (sums == nullptr) return;
    const int64_t to_row = padded16(columns);
    for (int64_t s = 0; s < batch.count; ++s) {
      const float* x = kept(s, source.row);
      float* to = turned + s * stride;
      if (source.weight != nullptr) {
        turn(x, t, columns, z.tokens, to, to_row, to_row, Affine{source.weight, source.bias});
      } else {
        turn(x, t, columns, z.tokens, to, to_row, to_row);
      }
    }
    add_turned(index, dy, rows, columns);
  }

  Samples samples(const float* first) const {
    Samples all{};
    for (int64_t s = 0; s < batch.count; ++s) all.at[s] = first + s * stride;
    return all;
  }

  void add_turned(int64_t index, const float* dy, int64_t rows, int64_t columns) {
    const Samples y = samples(dy);
    add_outer(y, t, samples(turned), padded16(columns), batch.count, rows, z.tokens, sums[index]);
    add_row_sums(y, batch.count, rows, t, sums[index + 1]);
  }

  // As add_weight_gradients for the feed-forward's second product, from g. Its gradient is summed as [ff][width]: that
  // turns g instead of the wider activation.
  void add_down_gradients(int64_t index, int64_t row) {
    if (sums == nullptr) return;
    Samples hidden{};
    for (int64_t s = 0; s < batch.count; ++s) {
      hidden.at[s] = kept(s, row);
      if (z.gelu) {
        float* to = wide + s * stride;
        for (int64_t i = 0; i < z.feedforward * t; i += F32::lanes) store(to + i, gelu(load(hidden.at[s] + i)));
        hidden.at[s] = to;
      }
      turn(g + s * stride, t, d, z.tokens, turned + s * stride, padded16(d), padded16(d));
    }
    add_outer(hidden, t, samples(turned), padded16(d), batch.count, z.feedforward, z.tokens, sums[index]);
    add_row_sums(samples(g), batch.count, d, t, sums[index + 1]);
  }

  // target <- gradient before the LayerNorm at weight `index`, plus rest.
  void through_norm(float* target, int64_t index, int64_t normal, int64_t rstd, const float* rest) {
    for (int64_t s = 0; s < batch.count; ++s) {
      norm_backward(target + s * stride, kept(s, normal), kept(s, rstd), network.weights[index],
                    rest == nullptr ? nullptr : rest + s * stride, d, t, sum_of(index), sum_of(index + 1));
    }
  }

  // grad of the output -> g, the gradient of what the output projection reads.
  void output(const Source& source) {
    const int64_t index = weight_count(z) - 2;
    for (int64_t s = 0; s < batch.count; ++s) {
      turn(batch.grad[s], z.features, z.tokens, z.features, wide + s * stride, t, t);
      multiply(columns_of(network.weights[index], d), wide + s * stride, d, z.features, t, Stored{g + s * stride, t},
               ahead_of(batch.h[s], z.features));
    }
    add_weight_gradients(index, wide, z.features, d, source);
  }

  // g [width] -> the gradient of the feed-forward's input, in `target`; plus rest (as target, may be null).
  void feed_forward_backward(int64_t first, int64_t block, float* target, const float* rest, const Source& input) {
    const BlockWeights w = block_weights(network.weights, block);
    const Kept at = kept_rows(z);
    const int64_t own = at.blocks + block * at.block, ff = z.feedforward;
    add_down_gradients(first + 6, own + at.active);
    for (int64_t s = 0; s < batch.count; ++s) {
      float* da = wide + s * stride;
      const float* active = kept(s, own + at.active);
      if (z.gelu) {
        multiply(columns_of(w.down, ff), g + s * stride, ff, d, t, Stored{da, t});
        for (int64_t i = 0; i < ff * t; i += F32::lanes) store(da + i, load(da + i) * gelu_slope(load(active + i)));
      } else {
        multiply(columns_of(w.down, ff), g + s * stride, ff, d, t, ThroughRelu{da, t, active});
      }
    }
    add_weight_gradients(first + 4, wide, ff, d, input);
    through(w.up, d, ff, target, rest, batch.kept, own);  // the attention of this block
  }

  // g [width] -> the gradient of the attention's input, in `target`; plus rest (as target, may be null).
  void attention_part(int64_t first, int64_t block, float* target, const float* rest, const Source& input) {
    const BlockWeights w = block_weights(network.weights, block);
    const Kept at = kept_rows(z);
    const int64_t own = at.blocks + block * at.block;
    add_weight_gradients(first + 2, g, d, d, {own + at.context, nullptr, nullptr});
    for (int64_t s = 0; s < batch.count; ++s) {
      float* d_context = turned + s * stride;  // free until the next product of weights
      multiply(columns_of(w.proj, d), g + s * stride, d, d, t, Stored{d_context, t},
               ahead_of(block == 0 ? batch.next_grad[s] : batch.next_shift[s], d));
      attention_backward(z, kept(s, own), kept(s, own + at.p), d_context, wide + s * stride, shared);
    }
    add_weight_gradients(first, wide, 3 * d, d, input);
    if (block > 0) {  // the feed-forward of the block below
      through(w.qkv, d, 3 * d, target, rest, batch.kept, own - at.block + at.normal1);
    } else {
      through(w.qkv, d, 3 * d, target, rest, batch.next, at.blocks + (z.layers - 1) * at.block + at.normal1);
    }
  }

  // target [columns][T] = weight^T wide + rest, weight [rows][columns]; meanwhile fetches kept row `next` of `from`.
  void through(const float* weight, int64_t columns, int64_t rows, float* target, const float* rest,
               const float* const* from, int64_t next) {
    for (int64_t s = 0; s < batch.count; ++s) {
      const Weights left = columns_of(weight, columns);
      const Ahead ahead = ahead_of(from[s] + next * t, rows);
      float* c = target + s * stride;
      if (rest == nullptr) {
        multiply(left, wide + s * stride, columns, rows, t, Stored{c, t}, ahead);
      } else {
        multiply(left, wide + s * stride, columns, rows, t, WithRest{c, t, rest + s * stride}, ahead);
      }
    }
  }

  // g: the gradient of W_in h + b + position.
  void input() {
    for (int64_t s = 0; s < batch.count; ++s) {
      const float* own = g + s * stride;
      if (batch.grad_h[s] != nullptr) {
        multiply(columns_of(network.weights[0], z.features), own, z.features, d, t, Stored{wide + s * stride, t});
        turn(wide + s * stride, t, z.features, z.tokens, batch.grad_h[s], z.features, z.features);
      }
      if (sums == nullptr) continue;
      for (int64_t i = 0; i < d * t; i += F32::lanes) store(sums[2] + i, load(sums[2] + i) + load(own + i));
      float* to = turned + s * stride;
      const int64_t wide_row = padded16(z.features);
      for (int64_t token = 0; token < z.tokens; ++token) {
        for (int64_t f = 0; f < wide_row; f += F32::lanes) {
          const int64_t left = z.features - f;
          store(to + token * wide_row + f,
                load_first(batch.h[s] + token * z.features + f, static_cast<int>(left < 0 ? 0 : left)));
        }
      }
    }
    if (sums != nullptr) add_turned(0, g, d, z.features);
  }
};

}  // namespace

void train_backward(const TrainNetwork& network, const TrainBatch& batch, float* const* sums, float* scratch) {
  Backward pass(network, batch, sums, scratch);
  const TrainShape& z = network.shape;
  const Kept at = kept_rows(z);
  const int64_t norm_index = weight_count(z) - 4;
  const BlockWeights top = block_weights(network.weights, z.layers - 1);
  const int64_t top_row = at.blocks + (z.layers - 1) * at.block;
  if (z.final_norm) {
    pass.output({at.normal, network.weights[norm_index], network.weights[norm_index + 1]});
    pass.through_norm(pass.g, norm_index, at.normal, at.rstd, nullptr);
  } else if (z.norm_first) {
    pass.output({at.last, nullptr, nullptr});
  } else {
    pass.output({top_row + at.normal2, top.norm2, top.norm2_bias});
  }
  for (int64_t block = z.layers - 1; block >= 0; --block) {
    const BlockWeights w = block_weights(network.weights, block);
    const int64_t first = 3 + block * kWeightsPerBlock, own = at.blocks + block * at.block;
    const Source after1{own + at.normal1, w.norm1, w.norm1_bias}, after2{own + at.normal2, w.norm2, w.norm2_bias};
    if (z.norm_first) {  // x += attention(norm1(x)); x += feed_forward(norm2(x))
      pass.feed_forward_backward(first, block, pass.inner, nullptr, after2);
      pass.through_norm(pass.inner, first + 10, own + at.normal2, own + at.rstd2, pass.g);
      pass.swap();
      pass.attention_part(first, block, pass.inner, nullptr, after1);
      pass.through_norm(pass.inner, first + 8, own + at.normal1, own + at.rstd1, pass.g);
      pass.swap();
    } else {  // x = norm1(x + attention(x)); x = norm2(x + feed_forward(x))
      pass.through_norm(pass.g, first + 10, own + at.normal2, own + at.rstd2, nullptr);
      pass.feed_forward_backward(first, block, pass.g, pass.g, after1);
      pass.through_norm(pass.g, first + 8, own + at.normal1, own + at.rstd1, nullptr);
      Source before{at.first, nullptr, nullptr};
      if (block > 0) {
        const BlockWeights below = block_weights(network.weights, block - 1);
        before = {own - at.block + at.normal2, below.norm2, below.norm2_bias};
      }
      pass.attention_part(first, block, pass.g, pass.g, before);
    }
  }
  pass.input();
}

void train_collect(const TrainShape& shape, float* const* sums, float* const* grads) {
  for (int64_t index = 0; index < weight_count(shape); ++index) {
    const auto [rows, columns] = weight_shape(shape, index);
    const float* sum = sums[index];
    float* grad = grads[index];
    if (columns == 0) {
      for (int64_t i = 0; i < rows; ++i) grad[i] = reduce_add(load(sum + i * kTrainPad));
    } else if (summed_transposed(shape, index)) {
      turn(sum, padded16(rows), columns, rows, grad, columns, columns);
    } else {
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t i = 0; i < columns; i += F32::lanes) {
          const int left = columns - i < F32::lanes ? static_cast<int>(columns - i) : F32::lanes;
          store_first(grad + row * columns + i, load(sum + row * padded16(columns) + i), left);
        }
      }
    }
  }
}
