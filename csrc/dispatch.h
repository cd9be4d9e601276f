// How a compiled kernel asks which backend was chosen, and hands the call over when it is another one.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <string>
#include <string_view>

namespace csikernels {

// The names of csikernels.use_backend(); `best` stands for "nothing was forced".
enum class Backend { best, cpp, cuda, triton, reference };

// Process-wide, because backward passes run on autograd's own threads. An empty name stands for `best`.
void set_backend(std::string_view name);
Backend chosen_backend();

inline bool is_chosen(Backend compiled) {
  const Backend chosen = chosen_backend();
  return chosen == Backend::best || chosen == compiled;
}

// Calls csikernels_python::<op>, which runs the chosen Python implementation or says that there is none.
// Signature is that of the schema, with c10::SymInt where the schema says SymInt.
template <class Signature, class... Args>
auto call_python(const char* op, Args&&... args) {
  const auto handle = c10::Dispatcher::singleton()
                          .findSchemaOrThrow((std::string("csikernels_python::") + op).c_str(), "")
                          .typed<Signature>();
  // The caller's autograd kernel has run already.
  const c10::impl::ExcludeDispatchKeyGuard below_autograd(c10::autograd_dispatch_keyset);
  return handle.call(std::forward<Args>(args)...);
}

}  // namespace csikernels
