// The network: included last, inside an instruction set's namespace.
//
// Outer is the Dot of the input and output projections, Inner that of the blocks' four products; kRound says that
// attention's operands are rounded to bfloat16.

#pragma once

#include "cpu/transformer_attention.h"

namespace {

template <class Outer, class Inner, bool kRound>
struct Pass {
  const Network& net;
  const Team& team;
  const Workspace& space;
  const int64_t stride = row_stride(net.width, 4);
  const int64_t context_stride = stride;

  template <class Dot>
  Rows<Dot> left_side(float* x, int64_t rows, const Norm* norm, bool keep) const {
    return encode_rows<Dot>(team, x, stride, rows, net.width, norm, net.eps, keep, space.operand, space.operand_scale,
                            space);
  }

  // h [samples * tokens][features] -> x = input(h) + position
  void enter(const float* h, int64_t samples, float* x) const {
    const int64_t rows = samples * net.tokens;
    const auto side = encode_rows<Outer>(team, const_cast<float*>(h), net.features, rows, net.features, nullptr, 0,
                                         false, space.operand, space.operand_scale, space);
    product(team, side, rows, net.input, [&](int64_t r, int64_t c, int64_t n, F32 a) {
      const float* position = net.position + r % net.tokens * net.width + c;
      store_up_to(x + r * stride + c, a + load_up_to(position, n), n);
    });
  }

  void block(const Block& weights, int64_t samples, float* x) const {
    const int64_t rows = samples * net.tokens;
    const auto residual = [&](int64_t r, int64_t c, int64_t n, F32 a) {
      float* at = x + r * stride + c;
      store_up_to(at, load_up_to(at, n) + a, n);
    };
    attend(left_side<Inner>(x, rows, net.norm_first ? &weights.norm1 : nullptr, false), weights, samples);
    const auto context = encode_rows<Inner>(team, space.context, context_stride, rows, net.width, nullptr, 0, false,
                                            space.operand, space.operand_scale, space);
    product(team, context, rows, weights.proj, residual);
    const Norm& norm = net.norm_first ? weights.norm2 : weights.norm1;
    const auto side = left_side<Inner>(x, rows, &norm, !net.norm_first);
    const auto hidden = net.gelu ? expand<true>(side, rows, weights.up) : expand<false>(side, rows, weights.up);
    product(team, hidden, rows, weights.down, residual);
    if (!net.norm_first) {
      for (int64_t r = 0; r < rows; ++r) {
        layer_norm(x + r * stride, net.width, weights.norm2, net.eps, x + r * stride);
      }
    }
  }

  void attend(const Rows<Inner>& side, const Block& weights, int64_t samples) const {
    const int64_t wide = row_stride(3 * net.width, 4);
    product(team, side, samples * net.tokens, weights.qkv, [&](int64_t r, int64_t c, int64_t n, F32 a) {
      store_up_to(space.wide + r * wide + c, kRound ? to_bf16(a) : a, n);
    });
    share(team, samples * net.heads, [&](int64_t first, int64_t end, int64_t member) {
      for (int64_t i = first; i < end; ++i) {
        const int64_t row = i / net.heads * net.tokens, column = i % net.heads * (net.width / net.heads);
        attention<kRound>(space.wide + row * wide, wide, net, space, member, column,
                          space.context + row * context_stride, context_stride);
      }
    });
  }

  // activation(x up^T + bias) as the left side of `down`
  template <bool kGelu>
  Rows<Inner> expand(const Rows<Inner>& side, int64_t rows, const Linear& up) const {
    using Element = typename Inner::Element;
    const auto activation = [](F32 a) {
      if constexpr (!kGelu) return max(broadcast(0.0f), a);
      return broadcast(0.5f) * a * (broadcast(1.0f) + erf(a * broadcast(0.707106781f)));
    };
    if constexpr (Inner::group == 4) {  // the scale of a row is known when the row is complete
      const int64_t wide = row_stride(net.feedforward, 4);
      product(team, side, rows, up, [&](int64_t r, int64_t c, int64_t n, F32 a) {
        store_up_to(space.wide + r * wide + c, activation(a), n);
      });
      return encode_rows<Inner>(team, space.wide, wide, rows, net.feedforward, nullptr, 0, false, space.hidden,
                                space.hidden_scale, space);
    } else {
      const Rows<Inner> hidden = {reinterpret_cast<Element*>(space.hidden),
                                  row_stride(net.feedforward, sizeof(Element)), space.hidden_scale};
      product(team, side, rows, up, [&](int64_t r, int64_t c, int64_t n, F32 a) {
        encode_lanes(activation(a), n, hidden.data + r * hidden.stride + c);
      });
      if (net.feedforward % Inner::group != 0) {
        for (int64_t r = 0; r < rows; ++r) hidden.data[r * hidden.stride + net.feedforward] = 0;
      }
      return hidden;
    }
  }

  void leave(float* x, int64_t samples, float* y) const {
    const int64_t rows = samples * net.tokens;
    const auto side = left_side<Outer>(x, rows, net.norm.weight != nullptr ? &net.norm : nullptr, false);
    product(team, side, rows, net.output,
            [&](int64_t r, int64_t c, int64_t n, F32 a) { store_up_to(y + r * net.features + c, a, n); });
  }
};

template <class Outer, class Inner, bool kRound>
void forward(const Network& net, const Team& team, const float* h, int64_t samples, float* y, char* workspace) {
  const Workspace space(net, samples, team.members, workspace);
  const Pass<Outer, Inner, kRound> pass{net, team, space};
  const int64_t sample = net.tokens * net.features;
  for (int64_t start = 0; start < samples; start += space.group) {
    const int64_t group = least(space.group, samples - start);
    const auto for_chunks = [&](auto body) {
      for (int64_t s = 0; s < group; s += space.chunk) {
        body((start + s) * sample, least(space.chunk, group - s), space.x + s * net.tokens * pass.stride);
      }
    };
    for_chunks([&](int64_t at, int64_t count, float* x) { pass.enter(h + at, count, x); });
    for (int64_t layer = 0; layer < net.layers; ++layer) {
      for_chunks([&](int64_t, int64_t count, float* x) { pass.block(net.blocks[layer], count, x); });
    }
    for_chunks([&](int64_t at, int64_t count, float* x) { pass.leave(x, count, y + at); });
  }
}

}  // namespace
