#include "bindings.h"

NB_MODULE(_core, module) {
    module.doc() = "The native core of pliant: kernels, executor, sampler, tokenizer.";
    pliant::init_errors(module);
    pliant::init_machine(module);
    pliant::init_executor(module);
    pliant::init_sampler(module);
    pliant::init_tokenizer(module);
}
