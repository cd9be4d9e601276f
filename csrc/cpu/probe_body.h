// The probes on F32, once per instruction set; included by probe_<isa>.cpp inside its namespace.

namespace {

bool same(const char* a, const char* b) {
  while (*a != '\0' && *a == *b) ++a, ++b;
  return *a == *b;
}

template <class Helper>
bool apply(const float* x, int64_t n, float* out, Helper helper) {
  for (int64_t i = 0; i < n; i += F32::lanes) {
    const int rest = n - i < F32::lanes ? static_cast<int>(n - i) : F32::lanes;
    store_first(out + i, helper(load_first(x + i, rest)), rest);
  }
  return true;
}

// Through bfloat16 and back, whole vectors at a time.
bool round_trip(const float* x, int64_t n, float* out) {
  return apply(x, n, out, [](F32 a) {
    uint16_t half[F32::lanes];
    store_bf16(half, a);
    return load_bf16(half);
  });
}

}  // namespace

bool vector_helper(const char* name, const float* x, int64_t n, float* out) {
  if (same(name, "exp2")) return apply(x, n, out, [](F32 a) { return exp2(a); });
  if (same(name, "exp2_of_nonpositive")) return apply(x, n, out, [](F32 a) { return exp2_of_nonpositive(a); });
  if (same(name, "exp")) return apply(x, n, out, [](F32 a) { return exp(a); });
  if (same(name, "log2")) return apply(x, n, out, [](F32 a) { return log2(a); });
  if (same(name, "erf")) return apply(x, n, out, [](F32 a) { return erf(a); });
  if (same(name, "sqrt")) return apply(x, n, out, [](F32 a) { return sqrt(a); });
  if (same(name, "round")) return apply(x, n, out, [](F32 a) { return round(a); });
  if (same(name, "bfloat16")) return round_trip(x, n, out);
  if (same(name, "reduce_add")) return apply(x, n, out, [](F32 a) { return broadcast(reduce_add(a)); });
  if (same(name, "reduce_max")) return apply(x, n, out, [](F32 a) { return broadcast(reduce_max(a)); });
  return false;
}

int64_t spin_float32(int64_t rounds) {
  constexpr int chains = 12;  // two units times a latency of four or five, and registers left for the operands
  F32 sum[chains];
  for (int c = 0; c < chains; ++c) sum[c] = broadcast(static_cast<float>(c));
  F32 a = broadcast(0.5f), b = broadcast(1.0f);
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int c = 0; c < chains; ++c) sum[c] = fma(sum[c], a, b);
  }
  for (int c = 1; c < chains; ++c) sum[0] = sum[0] + sum[c];
  // The sum is never NaN, but the compiler does not know: the loop stays.
  return reduce_add(sum[0]) != reduce_add(sum[0]) ? 0 : rounds * chains * F32::lanes * 2;
}

float sum(const float* p, int64_t n) {
  F32 total[8];
  for (auto& t : total) t = broadcast(0.0f);
  for (int64_t i = 0; i < n; i += 8 * F32::lanes) {
    for (int c = 0; c < 8; ++c) total[c] = total[c] + load(p + i + c * F32::lanes);
  }
  for (int c = 1; c < 8; ++c) total[0] = total[0] + total[c];
  return reduce_add(total[0]);
}
